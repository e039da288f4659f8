"""Batches hold exactly the files' rows, on any number of ranks, from any position, however row groups are cut."""

from dataclasses import replace
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.datasets.fitted import Fitted
from triptych.datasets.ids import table_rows
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import EpochOrder, ReadingPosition
from triptych.datasets.schema import DataSection, Feature, Label, Schema, TableIds

some_examples = settings(deadline=None, max_examples=20)

SCHEMA = Schema(
    DataSection(root=".", weight="w", batch_size=4, prefetch=2, workers=0),
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


def schema_with(**data):
    return replace(SCHEMA, data=SCHEMA.data.model_copy(update=data))


def write_log(folder, files, seed=0):
    """Write files of (rows, row group size). Returns their row groups, whole."""
    draw, paths = Random(seed), []
    for number, (num_rows, row_group_size) in enumerate(files):
        paths.append(str(folder / f"part-{number}.parquet"))
        pq.write_table(pa.Table.from_pylist([random_row(draw) for _ in range(num_rows)], ARROW), paths[-1], row_group_size)
    return list_slices(SCHEMA, paths, labels=True).slices


def cut(groups, num_rows):
    """The row groups in slices of so many rows."""
    return [
        part._replace(start=start, first_row=part.first_row + start, rows=min(num_rows, part.rows - start))
        for part in groups
        for start in range(0, part.rows, num_rows)
    ]


def loader_of(slices, *, rank=0, world_size=1, schema=SCHEMA, decoder=Decoder, **order):
    return Loader(decoder(schema, Fitted()), slices, rank=rank, world_size=world_size, **order)


def naive_row(number, row):
    """What a batch must hold for one row of `to_pylist`."""

    def ids(name, values):
        feature = SCHEMA.feature(name)
        return [int(table_rows(pa.array([value]), feature, SCHEMA.table(feature.table), Fitted(), "")[0]) for value in values]

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
    tables = [pq.read_table(path) for path in dict.fromkeys(group.file.path for group in groups)]
    return [naive_row(number, row) for number, row in enumerate(row for table in tables for row in table.to_pylist())]


def rows_of(batch):
    assert batch.ids.keys() == list(IDS)
    ids = {name: [ids.tolist() for ids in batch.ids[name].to_dense()] for name in IDS}
    dense, labels, known = batch.dense_BD.tolist(), batch.labels_BT.tolist(), batch.known_BT.tolist()
    return [
        {"row": row, **{name: ids[name][b] for name in IDS}, "dense": dense[b], "labels": labels[b], "known": known[b], "weight": weight}
        for b, (row, weight) in enumerate(zip(batch.row_B.tolist(), batch.weight_B.tolist(), strict=True))
    ]


logs = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=3).filter(lambda files: max(files)[0] > 0)
orders = st.fixed_dictionaries(
    {"seed": st.integers(0, 99), "shuffle": st.booleans(), "window": st.integers(1, 5), "batch_size": st.integers(1, 6)}
)
IN_FILE_ORDER = {"seed": 0, "shuffle": False, "window": 1, "batch_size": 4}


class TestBatches:
    @some_examples
    @given(logs, st.integers(1, 4), orders, st.integers(0, 2), st.integers(1, 5))
    @example([(2, 2)], 4, IN_FILE_ORDER, 0, 9)  # more ranks than rows
    @example([(3, 3), (1, 1)], 3, IN_FILE_ORDER, 0, 9)  # more ranks than row groups; files smaller than a batch
    def test_they_equal_rows_built_one_by_one(self, tmp_path_factory, files, world_size, order, epoch, slice_rows):
        groups = cut(write_log(tmp_path_factory.mktemp("log"), files, seed=order["seed"]), slice_rows)
        expected = naive_rows(groups)
        loaders = [loader_of(groups, rank=rank, world_size=world_size, **order) for rank in range(world_size)]
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
    @given(logs, st.integers(1, 4), orders, st.integers(1, 5))
    def test_each_rank_reads_its_share_of_the_order_of_the_epoch(self, tmp_path_factory, files, world_size, options, slice_rows):
        groups = cut(write_log(tmp_path_factory.mktemp("log"), files), slice_rows)
        order = EpochOrder(groups, epoch=2, **{name: options[name] for name in ("seed", "shuffle", "window")})
        within = {group: order.rows_within(group) if options["shuffle"] else range(group.rows) for group in groups}
        lanes = [[group.first_row + row for group in lane for row in within[group]] for lane in order.lanes]
        size = options["batch_size"] * world_size
        for rank in range(world_size):
            loader = loader_of(groups, rank=rank, world_size=world_size, **options)
            for step, batch in enumerate(loader.batches(ReadingPosition(2))):
                share = order.share(step * size, (step + 1) * size, rank, world_size)
                rows = [row for r in share for row in lanes[r.lane][r.start : r.stop]]
                assert batch.row_B.tolist() == rows + [-1] * (len(batch.row_B) - len(rows))

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("shuffle", [False, True])
    def test_a_small_memory_cuts_row_groups_and_every_row_comes_once(self, tmp_path, shuffle, world_size):
        path, draw = str(tmp_path / "f.parquet"), Random(0)
        rows = [random_row(draw) | {"seen": [row % 40] * 300} for row in range(600)]
        pq.write_table(pa.Table.from_pylist(rows, ARROW), path, 300)
        small = schema_with(memory_mb=1, shuffle_row_groups=2)
        slices = list_slices(small, [path], labels=True).slices
        assert len(list_slices(SCHEMA, [path], labels=True).slices) == 2 and len(slices) > 6
        options = {"schema": small, "shuffle": shuffle, "window": 2, "batch_size": 100}
        loaders = [loader_of(slices, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        found = [row for loader in loaders for batch in loader.batches() for row in rows_of(batch) if row["row"] >= 0]
        assert sorted(found, key=lambda row: row["row"]) == naive_rows(slices)

    def test_batch_size_is_the_recipes_unless_given(self, tmp_path):
        groups = write_log(tmp_path, [(10, 10)])
        assert [len(batch.row_B) for batch in loader_of(groups, rank=0, world_size=1).batches()] == [4, 4, 2]
        assert [len(batch.row_B) for batch in loader_of(groups, rank=0, world_size=2, batch_size=3).batches()] == [3, 2]


class TestPosition:
    @some_examples
    @given(logs, st.integers(1, 3), orders, st.integers(0, 3), st.integers(1, 5))
    def test_resuming_at_any_step_gives_exactly_the_next_batches(self, tmp_path_factory, files, world_size, order, epoch, slice_rows):
        groups = cut(write_log(tmp_path_factory.mktemp("log"), files), slice_rows)
        for rank in range(world_size):
            position = ReadingPosition(epoch)
            loader = loader_of(groups, rank=rank, world_size=world_size, **order)
            whole = [rows_of(batch) for batch in loader.batches(position)]
            for step in range(len(whole)):
                resumed = loader_of(groups, rank=rank, world_size=world_size, **order)
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
            loaders = [loader_of(groups, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
            batches = [batch for loader in loaders for batch in loader.batches(position, steps=1)]
            trained += [row for batch in batches for row in batch.row_B.tolist() if row >= 0]
            position, step = loaders[0].after_step(position), step + 1
        assert sorted(trained) == list(range(loaders[0].num_rows))
