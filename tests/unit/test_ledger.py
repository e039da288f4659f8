"""Every row of every epoch is trained exactly once, over stops at random points, on any number of ranks and threads."""

import json
import sys
import threading
from dataclasses import asdict
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader, Tally
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import EpochOrder, ReadingPosition
from triptych.datasets.schema import DataSection, Feature, Label, Schema, TableIds

EPOCHS = 2
STOPS = 7
"""In one campaign; five campaigns are short, thirty are long: 210 stop points."""
MOST_SEEN = 4


def schema(**data):
    return Schema(
        DataSection(root=".", memory_mb=1, **data),
        tables=(TableIds(name="item", rows=50, ids="index"),),
        features=(Feature(name="number", kind="dense"), Feature(name="seen", kind="ids", table="item")),
        labels=(Label(name="ctr", kind="binary", label="click"),),
    )


def write_log(folder, draw):
    """Ragged files: empty ones, ones smaller than a batch, and row groups small and large. Every column follows from the row's number."""
    sizes = [0, draw.randint(1, 9), *(draw.choice([3, 150, 900, 2500, 8000]) + draw.randrange(50) for _ in range(draw.randint(2, 4)))]
    draw.shuffle(sizes)
    first, paths = 0, []
    for size in sizes:
        number = np.arange(first, first + size)
        seen = np.repeat(number % 50, number % MOST_SEEN)
        offsets = np.concatenate([[0], np.cumsum(number % MOST_SEEN)]).astype(np.int32)
        table = pa.table(
            {
                "number": number,
                "seen": pa.ListArray.from_arrays(pa.array(offsets), pa.array(seen, pa.int64())),
                "click": (number % 2).astype(np.int8),
            }
        )
        paths.append(str(folder / f"part-{len(paths)}.parquet"))
        pq.write_table(table, paths[-1], row_group_size=draw.choice([7, 1300] if size < 200 else [400, 1300, 9000]))
        first += size
    return paths, first


class CountingDecoder(Decoder):
    """Notes the first row of every slice that it decodes."""

    def __init__(self, schema):
        super().__init__(schema, Fitted())
        self.decoded = []

    def decode(self, table, where, first_row):
        self.decoded.append(first_row)
        return super().decode(table, where, first_row)


def make_loaders(paths, order, world_size, global_batch_size, **data):
    """One loader a rank, as the processes of one run would have them."""
    the_schema = schema(shuffle=order["shuffle"], shuffle_row_groups=order["window"], **data)
    slices = list_slices(the_schema, paths, labels=True).slices
    return [
        Loader(
            CountingDecoder(the_schema), slices, rank=rank, world_size=world_size, batch_size=global_batch_size // world_size, **order
        )
        for rank in range(world_size)
    ]  # fmt: skip


def step_rows(batches):
    """The rows of one step over all ranks. Each holds its own row's values; padding holds none and weighs nothing."""
    assert len({len(batch.row_B) for batch in batches}) == 1
    trained = []
    for batch in batches:
        row_B, lengths_B = batch.row_B.numpy(), batch.ids["seen"].lengths().numpy()
        real_B = row_B >= 0
        assert (row_B[~real_B] == -1).all()
        assert np.array_equal(batch.weight_B.numpy(), real_B.astype(np.float32))
        assert np.array_equal(batch.dense_BD.numpy()[:, 0], np.where(real_B, row_B, 0))
        assert np.array_equal(lengths_B, np.where(real_B, row_B % MOST_SEEN, 0))
        assert np.array_equal(batch.ids["seen"].values().numpy(), np.repeat(row_B % 50, lengths_B))
        assert np.array_equal(batch.labels_BT.numpy()[:, 0], np.where(real_B, row_B % 2, 0))
        assert np.array_equal(batch.known_BT.numpy()[:, 0], real_B)
        trained.append(row_B[real_B])
    sizes = [len(rows) for rows in trained]
    assert max(sizes) - min(sizes) <= 1
    return np.concatenate(trained)


def train(loaders, position, steps):
    """Train steps on all ranks and stop in the midst of reading. Returns the rows of each step and where reading stands.

    Batches that were read ahead by then are thrown away, as when a process ends.
    """
    readers = [loader.batches(position) for loader in loaders]
    trained = []
    for _ in range(steps):
        trained.append(step_rows([next(reader) for reader in readers]))
        position = loaders[0].after_step(position)
        if position.row == 0:  # an epoch ends for all ranks at once, and not before its last row
            assert all(next(reader, None) is None for reader in readers)
            readers = [loader.batches(position) for loader in loaders]
    del readers  # stops their threads
    return trained, position


def check_decoded(loaders, order, began, ended):
    """From one stop to the next, a rank decodes a slice once at most; none that was used up before, and none far ahead of need."""
    decoded = [sorted(loader.decoder.decoded) for loader in loaders]
    if began.epoch != ended.epoch:
        return  # the order changed in between
    assert all(len(set(rows)) == len(rows) for rows in decoded)
    epoch = EpochOrder(loaders[0].slices, seed=order["seed"], epoch=began.epoch, shuffle=order["shuffle"], window=order["window"])
    ahead = loaders[0].schema.data.prefetch * loaders[0].global_batch_size if loaders[0].schema.data.workers else 0
    used, needed = epoch.taken(began.row), epoch.taken(min(ended.row + ahead, epoch.num_rows))
    allowed = set()
    for lane, parts in enumerate(epoch.lanes):
        ends = np.cumsum([part.rows for part in parts])
        first = int(np.searchsorted(ends, used[lane], side="right"))
        last = int(np.searchsorted(ends, needed[lane], side="right")) + 1  # the next one is decoded ahead
        allowed |= {part.first_row for part in parts[first : last + 1]}
    assert {row for rows in decoded for row in rows} <= allowed


def run_campaign(tmp_path, seed, *, same_batches):
    """Two epochs in STOPS + 1 legs. Returns the rows of each step of each epoch."""
    draw = Random(seed)
    paths, num_rows = write_log(tmp_path, draw)
    order = {"seed": seed, "shuffle": seed % 3 > 0, "window": draw.choice([1, 3, 8]) if seed % 3 else 1}
    state, steps_by_epoch = None, [[], []]
    for leg in range(STOPS + 1):
        world_size = draw.randint(1, 4)
        global_batch_size = 48 if same_batches else world_size * draw.randint(5, 60)
        data = {"workers": draw.randrange(4), "prefetch": draw.randint(1, 4)}
        loaders = make_loaders(paths, order, world_size, global_batch_size, **data)
        assert loaders[0].num_rows == num_rows
        positions = [ReadingPosition() if state is None else loader.load_state_dict(json.loads(state)) for loader in loaders]
        assert len(set(positions)) == 1
        began = positions[0]
        left = loaders[0].steps_left(began) + (EPOCHS - 1 - began.epoch) * loaders[0].steps_left(ReadingPosition())
        steps = left if leg == STOPS else min(left - 1, draw.randint(0, 2 * left // (STOPS + 1 - leg)))
        trained, position = train(loaders, began, steps)
        check_decoded(loaders, order, began, position)
        states = {json.dumps(loader.state_dict(position)) for loader in loaders}
        assert len(states) == 1 and len(states.copy().pop()) < 500
        state, row, epoch = states.pop(), began.row, began.epoch
        for rows in trained:
            steps_by_epoch[epoch].append(rows)
            row += len(rows)
            row, epoch = (row, epoch) if row < num_rows else (0, epoch + 1)
        assert (epoch, row) == (position.epoch, position.row)
    assert position == ReadingPosition(EPOCHS, 0)
    return paths, order, steps_by_epoch, num_rows


CAMPAIGNS = [*range(5), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(5, 30))]


@pytest.mark.parametrize("seed", CAMPAIGNS)
def test_every_row_once_over_stops_on_changing_ranks(tmp_path, seed):
    _, _, steps_by_epoch, num_rows = run_campaign(tmp_path, seed, same_batches=False)
    for steps in steps_by_epoch:
        assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(num_rows))


@pytest.mark.parametrize("seed", CAMPAIGNS[:2] + CAMPAIGNS[-10:])
def test_global_batches_do_not_depend_on_ranks_threads_and_stops(tmp_path, seed):
    paths, order, stopped, num_rows = run_campaign(tmp_path, 1000 + seed, same_batches=True)
    loaders = make_loaders(paths, order, 1, 48, workers=0)
    for epoch, steps in enumerate(stopped):
        assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(num_rows))
        undisturbed, _ = train(loaders, ReadingPosition(epoch), loaders[0].steps_left(ReadingPosition()))
        assert [set(rows.tolist()) for rows in steps] == [set(rows.tolist()) for rows in undisturbed]


def test_logs_are_as_ragged_as_promised(tmp_path):
    """Over the short campaigns: slices and whole row groups, files without rows and with fewer than a batch."""
    sliced = whole = 0
    for seed in range(5):
        draw = Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths, num_rows = write_log(folder, draw)
        sizes = [pq.read_metadata(path).num_rows for path in paths]
        assert 0 in sizes and any(0 < size < 10 for size in sizes) and sum(sizes) == num_rows
        slices = list_slices(schema(shuffle=True, shuffle_row_groups=8), paths, labels=True).slices
        groups = {(part.file, part.row_group) for part in slices}
        sliced, whole = sliced + len(slices) - len(groups), whole + len(groups)
    assert sliced > 10 and whole > 10


def test_a_tally_is_copied_while_threads_add_to_it():
    """A checkpoint holds the tally, and is written while slices are decoded ahead."""
    tally = Tally()
    done = threading.Event()

    def decode_ahead():
        for row in range(30_000):
            tally.capped[str(row)] = {"dwell": (1, 0)}
        done.set()

    thread, interval = threading.Thread(target=decode_ahead), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        while not done.is_set():
            assert asdict(tally.copy())["skipped"] == {}
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert tally.copy().report()["capped"] == {"dwell": {"negative": 30_000, "above_cap": 0}}
