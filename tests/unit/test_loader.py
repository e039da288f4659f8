"""Batches hold exactly the files' rows, on any number of ranks, from any position; the reading thread is well-behaved."""

import gc
import threading
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.datasets.files import list_row_groups
from triptych.datasets.ids import table_rows
from triptych.datasets.loader import Loader, in_background
from triptych.datasets.row_groups import EpochOrder, ReadingPosition
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

some_examples = settings(deadline=None, max_examples=30)

SCHEMA = Schema(
    DataSection(root=".", weight="w", batch_size=4, prefetch=2),
    tables=(TableIds(name="word", rows=50), TableIds(name="item", rows=40, ids="index"), TableIds(name="band", rows=4, ids="index")),
    features=(
        Feature(name="seen", kind="ids", table="item", max_length=3),
        Feature(name="user", kind="id", table="word"),
        Feature(name="price", kind="dense", transform="log1p", scale=0.5, default=3),
        Feature(name="page", kind="id", table="word", default="none"),
        Feature(name="tags", kind="ids", table="word"),
        Feature(name="age_band", column="age", kind="id", table="band", buckets=(18, 30, 50)),
        Feature(name="vector", kind="vector", size=2),
    ),
    labels=(
        Label(name="dwell", kind="duration", label="dwell_ms", scale=0.001, cap=60, given="ctr"),
        Label(name="ctr", kind="binary", label="click"),
        Label(name="cvr", kind="binary", label="buy", given="ctr"),
    ),
)
ARROW = pa.schema(
    {
        "seen": pa.list_(pa.int32()), "user": pa.int64(), "price": pa.float64(), "page": pa.string(), "tags": pa.list_(pa.string()),
        "age": pa.int16(), "vector": pa.list_(pa.float32(), 2), "dwell_ms": pa.int64(), "click": pa.int8(), "buy": pa.bool_(),
        "w": pa.float32(),
    }
)  # fmt: skip
IDS = ("user", "page", "age_band", "seen", "tags")
PADDED_ROW = {"row": -1, **{name: [] for name in IDS}, "dense": [0, 0, 0], "labels": [0, 0, 0], "known": [False] * 3, "weight": 0}


def random_row(draw):
    return {
        "seen": draw.choice([None, [draw.randrange(40) for _ in range(draw.randrange(6))]]),
        "user": draw.randrange(-9, 10**12),
        "price": draw.choice([None, 0.0, draw.random() * 100]),
        "page": draw.choice([None, "", "é", "home"]),
        "tags": [draw.choice(["red", "blue", ""]) for _ in range(draw.randrange(3))],
        "age": draw.choice([0, 17, 18, 30, 49, 50, 99]),
        "vector": [draw.random(), -draw.random()],
        "dwell_ms": draw.choice([0, 1_500, 59_999, 10**7]),
        "click": draw.randrange(2),
        "buy": draw.random() < 0.5,
        "w": draw.choice([0.0, 1.0, 0.25]),
    }


def write_log(folder, files, seed=0):
    """Write files of (rows, row group size). Returns their row groups."""
    draw, paths = Random(seed), []
    for number, (num_rows, row_group_size) in enumerate(files):
        paths.append(str(folder / f"part-{number}.parquet"))
        pq.write_table(pa.Table.from_pylist([random_row(draw) for _ in range(num_rows)], ARROW), paths[-1], row_group_size)
    return list_row_groups(paths)


def naive_row(number, row):
    """What a batch must hold for one row of `to_pylist`."""

    def ids(name, values):
        feature = SCHEMA.feature(name)
        return [int(table_rows(pa.array([value]), feature, SCHEMA.table(feature.table), "")[0]) for value in values]

    price = np.log1p(3.0 if row["price"] is None else row["price"]) * 0.5
    clicked = row["click"] == 1
    return {
        "row": number,
        "user": ids("user", [row["user"]]),
        "page": ids("page", ["none" if row["page"] is None else row["page"]]),
        "age_band": [sum(row["age"] >= edge for edge in (18, 30, 50))],
        "seen": (row["seen"] or [])[-3:],
        "tags": ids("tags", row["tags"]),
        "dense": [float(np.float32(price)), *row["vector"]],
        "labels": [float(np.float32(min(row["dwell_ms"] * 0.001, 60))) if clicked else 0, row["click"], row["buy"] if clicked else 0],
        "known": [clicked, True, clicked],
        "weight": row["w"],
    }


def naive_rows(groups):
    tables = [pq.read_table(path) for path in dict.fromkeys(group.path for group in groups)]
    return [naive_row(number, row) for number, row in enumerate(row for table in tables for row in table.to_pylist())]


def rows_of(batch):
    assert batch.ids.keys() == list(IDS)
    ids = {name: [ids.tolist() for ids in batch.ids[name].to_dense()] for name in IDS}
    dense, labels, known = batch.dense_BD.tolist(), batch.labels_BT.tolist(), batch.known_BT.tolist()
    return [
        {"row": row, **{name: ids[name][b] for name in IDS}, "dense": dense[b], "labels": labels[b], "known": known[b], "weight": weight}
        for b, (row, weight) in enumerate(zip(batch.row_B.tolist(), batch.weight_B.tolist(), strict=True))
    ]


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


logs = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=3).filter(lambda files: max(files)[0] > 0)
orders = st.fixed_dictionaries(
    {"seed": st.integers(0, 99), "shuffle": st.booleans(), "window": st.integers(1, 5), "batch_size": st.integers(1, 6)}
)
IN_FILE_ORDER = {"seed": 0, "shuffle": False, "window": 1, "batch_size": 4}


class TestBatches:
    @some_examples
    @given(logs, st.integers(1, 4), orders, st.integers(0, 2))
    @example([(2, 2)], 4, IN_FILE_ORDER, 0)  # more ranks than rows
    @example([(3, 3), (1, 1)], 3, IN_FILE_ORDER, 0)  # more ranks than row groups; files smaller than a batch
    def test_they_equal_rows_built_one_by_one(self, tmp_path_factory, files, world_size, order, epoch):
        groups = write_log(tmp_path_factory.mktemp("log"), files, seed=order["seed"])
        expected = naive_rows(groups)
        loaders = [Loader(SCHEMA, groups, rank=rank, world_size=world_size, **order) for rank in range(world_size)]
        ranks = [list(loader.batches(ReadingPosition(epoch))) for loader in loaders]
        assert len({tuple(len(batch.row_B) for batch in batches) for batches in ranks}) == 1  # steps, and the size at each
        trained = []
        for step, batches in enumerate(zip(*ranks, strict=True)):
            rows = [row for batch in batches for row in rows_of(batch)]
            real = [row for row in rows if row["row"] >= 0]
            assert rows == [expected[row["row"]] if row["row"] >= 0 else PADDED_ROW for row in rows]
            assert len(rows) - len(real) < (world_size if step == len(ranks[0]) - 1 else 1)
            trained += [row["row"] for row in real]
        assert sorted(trained) == list(range(len(expected)))

    @some_examples
    @given(logs, st.integers(1, 4), orders)
    def test_each_rank_reads_its_share_of_the_order_of_the_epoch(self, tmp_path_factory, files, world_size, options):
        groups = write_log(tmp_path_factory.mktemp("log"), files)
        order = EpochOrder(groups, epoch=2, **{name: options[name] for name in ("seed", "shuffle", "window")})
        within = {group: order.rows_within(group) if options["shuffle"] else range(group.rows) for group in groups}
        lanes = [[group.first_row + row for group in lane for row in within[group]] for lane in order.lanes]
        size = options["batch_size"] * world_size
        for rank in range(world_size):
            loader = Loader(SCHEMA, groups, rank=rank, world_size=world_size, **options)
            for step, batch in enumerate(loader.batches(ReadingPosition(2))):
                share = order.share(step * size, (step + 1) * size, rank, world_size)
                rows = [row for r in share for row in lanes[r.lane][r.start : r.stop]]
                assert batch.row_B.tolist() == rows + [-1] * (len(batch.row_B) - len(rows))

    def test_batch_size_is_the_recipes_unless_given(self, tmp_path):
        groups = write_log(tmp_path, [(10, 10)])
        assert [len(batch.row_B) for batch in Loader(SCHEMA, groups, rank=0, world_size=1).batches()] == [4, 4, 2]
        assert [len(batch.row_B) for batch in Loader(SCHEMA, groups, rank=0, world_size=2, batch_size=3).batches()] == [3, 2]


class TestPosition:
    @some_examples
    @given(logs, st.integers(1, 3), orders, st.integers(0, 3))
    def test_resuming_at_any_step_gives_exactly_the_next_batches(self, tmp_path_factory, files, world_size, order, epoch):
        groups = write_log(tmp_path_factory.mktemp("log"), files)
        for rank in range(world_size):
            position = ReadingPosition(epoch)
            loader = Loader(SCHEMA, groups, rank=rank, world_size=world_size, **order)
            whole = [rows_of(batch) for batch in loader.batches(position)]
            for step in range(len(whole)):
                resumed = Loader(SCHEMA, groups, rank=rank, world_size=world_size, **order)
                assert resumed.steps_left(position) == len(whole) - step
                assert [rows_of(batch) for batch in resumed.batches(position)] == whole[step:]
                assert [rows_of(batch) for batch in resumed.batches(position, steps=step)] == whole[step : 2 * step]
                position = resumed.after_step(position)
            assert position == ReadingPosition(epoch + 1, 0)

    @some_examples
    @given(logs, st.permutations([1, 2, 3, 4]), st.integers(1, 3))
    def test_an_epoch_goes_on_with_other_numbers_of_ranks(self, tmp_path_factory, files, world_sizes, batch_size):
        groups = write_log(tmp_path_factory.mktemp("log"), files)
        options = {"shuffle": True, "window": 3, "seed": 7, "batch_size": batch_size}
        position, trained, step = ReadingPosition(), [], 0
        while position.epoch == 0:
            world_size = world_sizes[step % 4]
            loaders = [Loader(SCHEMA, groups, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
            batches = [batch for loader in loaders for batch in loader.batches(position, steps=1)]
            trained += [row for batch in batches for row in batch.row_B.tolist() if row >= 0]
            position, step = loaders[0].after_step(position), step + 1
        assert sorted(trained) == list(range(loaders[0].num_rows))


class RecordingLoader(Loader):
    def __init__(self, *args, decoding=lambda: None, **options):
        super().__init__(*args, **options)
        self.decoded, self.decoding = [], decoding

    def _decode(self, group):
        self.decoded.append(group)
        self.decoding()
        return super()._decode(group)


class TestReading:
    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_each_rank_decodes_the_row_groups_of_its_lanes_once(self, tmp_path, world_size):
        groups = write_log(tmp_path, [(24, 3), (12, 3)])
        lanes = EpochOrder(groups, seed=5, epoch=0, shuffle=True, window=4).lanes
        for rank in range(world_size):
            loader = RecordingLoader(SCHEMA, groups, rank=rank, world_size=world_size, seed=5, shuffle=True, window=4, batch_size=4)
            list(loader.batches())
            own = lanes[rank * 4 // world_size : (rank + 1) * 4 // world_size]
            assert sorted(loader.decoded) == sorted(group for lane in own for group in lane)

    def test_a_bad_row_ends_reading_after_the_batches_before_it(self, tmp_path):
        groups = write_log(tmp_path, [(8, 2), (8, 2)])
        table = pq.read_table(groups[4].path)
        pq.write_table(table.set_column(8, "click", pa.array([0] * 4 + [2] * 4)), tmp_path / "bad.parquet", 2)
        groups = list_row_groups([groups[0].path, str(tmp_path / "bad.parquet")])
        batches = Loader(SCHEMA, groups, rank=0, world_size=1, batch_size=2).batches()
        assert [next(batches).row_B.tolist() for _ in range(6)] == [[row, row + 1] for row in range(0, 12, 2)]
        with pytest.raises(InputError, match=r"bad\.parquet: row group 2: label 'click' .* holds 2"):
            next(batches)
        assert readers() == []

    def test_a_reader_ends_when_it_is_exhausted_closed_or_forgotten(self, tmp_path):
        loader = Loader(SCHEMA, write_log(tmp_path, [(40, 4)]), rank=0, world_size=1, batch_size=2)
        exhausted, closed, forgotten = (loader.batches() for _ in range(3))
        next(exhausted), next(closed), next(forgotten)
        assert len(readers()) == 3
        assert len(list(exhausted)) == 19
        assert len(readers()) == 2
        closed.close()
        assert len(readers()) == 1
        del forgotten
        gc.collect()
        assert readers() == []


class Ahead:
    """Counts what the thread has begun beyond what its consumer has asked for."""

    def __init__(self):
        self.begun = self.asked = self.most = 0
        self.changed = threading.Condition()

    def begin(self):
        with self.changed:
            self.begun += 1
            self.most = max(self.most, self.begun - self.asked)
            self.changed.notify()

    def consume(self, items, depth):
        """Take one item, wait for the thread to be `depth` ahead of it and go no further, then take the rest."""
        with self.changed:
            self.asked = 1
        next(items)
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun == 1 + depth, timeout=60)
            assert not self.changed.wait_for(lambda: self.begun > 1 + depth, timeout=0.2)
            self.asked = 2
        for _ in items:
            with self.changed:
                self.asked += 1


class TestReadingAhead:
    @pytest.mark.parametrize("depth", [1, 2, 5])
    def test_at_most_depth_items_are_computed_ahead(self, depth):
        ahead = Ahead()

        def items():
            for item in range(200):
                ahead.begin()
                yield item

        ahead.consume(in_background(items, depth), depth)
        assert ahead.most == depth

    def test_prefetch_is_the_depth(self, tmp_path):
        groups, ahead = write_log(tmp_path, [(40, 1)]), Ahead()
        loader = RecordingLoader(SCHEMA, groups, rank=0, world_size=1, batch_size=1, decoding=ahead.begin)
        ahead.consume(loader.batches(), SCHEMA.data.prefetch)
        assert ahead.most == SCHEMA.data.prefetch

    def test_items_come_in_order_and_an_exception_after_them(self):
        def items():
            yield from range(9)
            raise KeyError("from the thread")

        received = in_background(items, 3)
        assert [next(received) for _ in range(9)] == list(range(9))
        with pytest.raises(KeyError, match="from the thread"):
            next(received)
