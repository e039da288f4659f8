"""Decoded rows are permuted, cut, shortened and joined exactly as Python lists of rows would be."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import as_lists
from triptych.datasets.columns import Columns, Jagged, Part, empty_columns, to_batch
from triptych.datasets.schema import DataSection, Feature, Label, Schema, TableIds

many_examples = settings(deadline=None, max_examples=60)
lists_of_ids = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=8)

SCHEMA = Schema(
    DataSection(root="."),
    tables=(TableIds(name="t", rows=100),),
    features=(
        Feature(name="seen", kind="ids", table="t"),
        Feature(name="user", kind="id", table="t"),
        Feature(name="price", kind="dense"),
        Feature(name="item", kind="id", table="t"),
        Feature(name="tags", kind="ids", table="t"),
        Feature(name="vector", kind="vector", size=2),
    ),
    labels=(Label(name="ctr", kind="binary", label="click"), Label(name="cvr", kind="binary", label="buy", given="ctr")),
)


def jagged(lists, offsets=np.int64):
    """These lists; without offsets, if all hold one value and offsets are None."""
    values = np.array([v for values in lists for v in values], np.int64)
    if offsets is None:
        assert all(len(values) == 1 for values in lists)
        return Jagged(values)
    whole = Jagged.from_lengths(values, np.array([len(values) for values in lists], np.int64))
    return Jagged(whole.value_M, whole.offsets_N1.astype(offsets))


# Lists and their kind of offsets; one value each needs none.
many_lists = st.one_of(
    st.tuples(lists_of_ids, st.sampled_from([np.int32, np.int64])),
    st.tuples(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=1), max_size=8), st.none()),
)


ONE_ID = ("user", "item")


def stretch_of(lists):
    """A strategy of (start, stop) within these lists."""
    return st.tuples(st.integers(0, len(lists)), st.integers(0, len(lists))).map(sorted)


small_floats = st.integers(-8, 8).map(lambda eighth: eighth / 8)
one_row = st.fixed_dictionaries(
    {
        "user": st.lists(st.integers(0, 99), min_size=1, max_size=1),
        "item": st.lists(st.integers(0, 99), min_size=1, max_size=1),
        "seen": st.lists(st.integers(0, 99), max_size=4),
        "tags": st.lists(st.integers(0, 99), max_size=4),
        "dense": st.lists(small_floats, min_size=3, max_size=3),
        "labels": st.lists(small_floats, min_size=2, max_size=2),
        "known": st.lists(st.booleans(), min_size=2, max_size=2),
        "weight": small_floats,
        "row": st.integers(-1, 99),
    }
)
many_rows = st.lists(one_row, min_size=1, max_size=6)
PADDED_ROW = {
    "user": [], "item": [], "seen": [], "tags": [], "dense": [0, 0, 0], "labels": [0, 0], "known": [False, False], "weight": 0, "row": -1
}  # fmt: skip


def columns_of(rows, skipped=()):
    """The rows as columns: one-id features, which every row has, without offsets, unless they are skipped."""

    def array(name, width, kind):
        return np.array([row[name] for row in rows], kind).reshape(len(rows), width)

    return Columns(
        ids_F=[
            Jagged.empty(len(rows)) if name in skipped else jagged([row[name] for row in rows], None if name in ONE_ID else np.int32)
            for name in SCHEMA.id_feature_names
        ],
        dense_ND=array("dense", 3, np.float32),
        labels_NT=array("labels", 2, np.float32),
        known_NT=array("known", 2, bool),
        weight_N=np.array([row["weight"] for row in rows], np.float32),
        row_N=np.array([row["row"] for row in rows], np.int64),
    )


def rows_of(batch):
    """A Batch as rows; ids by name through TorchRec's own accessor."""
    ids = {name: [ids.tolist() for ids in batch.ids[name].to_dense()] for name in batch.ids.keys()}  # noqa: SIM118
    return [
        {
            **{name: rows[b] for name, rows in ids.items()},
            "dense": batch.dense_BD[b].tolist(),
            "labels": batch.labels_BT[b].tolist(),
            "known": batch.known_BT[b].tolist(),
            "weight": batch.weight_B[b].item(),
            "row": batch.row_B[b].item(),
        }
        for b in range(len(batch.row_B))
    ]


def joined(parts):
    """The rows of a Batch of parts, or of whole columns."""
    return rows_of(to_batch([Part(p, 0, len(p)) if isinstance(p, Columns) else p for p in parts], SCHEMA.id_feature_names))


class TestJagged:
    @many_examples
    @given(many_lists)
    def test_lists_survive_and_lengths_are_theirs(self, lists_and_offsets):
        lists, offsets = lists_and_offsets
        assert as_lists(jagged(lists, offsets)) == lists
        assert jagged(lists, offsets).lengths_N.tolist() == [len(values) for values in lists]

    @many_examples
    @given(many_lists, st.data())
    def test_take_equals_indexing_a_list(self, lists_and_offsets, data):
        lists, offsets = lists_and_offsets
        rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12)) if lists else []
        taken = jagged(lists, offsets).take(np.array(rows, np.int64))
        assert as_lists(taken) == [lists[row] for row in rows] and taken.value_M.dtype == np.int64

    @many_examples
    @given(many_lists, st.integers(1, 6))
    def test_last_keeps_the_end_of_every_list(self, lists_and_offsets, max_length):
        lists, offsets = lists_and_offsets
        assert as_lists(jagged(lists, offsets).last(max_length)) == [values[-max_length:] for values in lists]

    @many_examples
    @given(many_lists, st.integers(1, 6), st.data())
    def test_operations_compose(self, lists_and_offsets, max_length, data):
        lists, offsets = lists_and_offsets
        rows = data.draw(st.permutations(range(len(lists))))
        result = jagged(lists, offsets).take(np.array(rows, np.int64)).last(max_length).take(np.array(rows, np.int64))
        assert as_lists(result) == [lists[rows[row]][-max_length:] for row in rows]

    def test_empty_lists(self):
        assert as_lists(Jagged.empty(3)) == [[], [], []]
        assert as_lists(Jagged.empty(3).take(np.array([2, 0]))) == [[], []]
        assert as_lists(Jagged.empty(0)) == []


class TestColumns:
    @many_examples
    @given(many_rows, st.data())
    def test_take_equals_indexing_rows(self, rows, data):
        taken = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
        assert joined([columns_of(rows).take(np.array(taken))]) == [rows[i] for i in taken]

    @many_examples
    @given(many_rows, st.data())
    def test_a_part_equals_slicing_rows(self, rows, data):
        start, stop = data.draw(stretch_of(rows))
        part = Part(columns_of(rows), start, stop)
        assert len(part) == stop - start
        assert joined([part]) == rows[start:stop]

    def test_empty_columns_are_padded_rows(self):
        assert joined([empty_columns(2, SCHEMA)]) == [PADDED_ROW] * 2
        assert joined([empty_columns(0, SCHEMA)]) == []


class TestToBatch:
    @many_examples
    @given(st.lists(many_rows, min_size=1, max_size=4), st.integers(0, 3), st.data())
    def test_parts_and_padding_join_row_after_row(self, parts, padding, data):
        stretches = [data.draw(stretch_of(rows)) for rows in parts]
        columns = [Part(columns_of(rows), *stretch) for rows, stretch in zip(parts, stretches, strict=True)]
        expected = [row for rows, (start, stop) in zip(parts, stretches, strict=True) for row in rows[start:stop]]
        assert joined([*columns, empty_columns(padding, SCHEMA)]) == expected + [PADDED_ROW] * padding

    @many_examples
    @given(st.lists(many_rows, min_size=1, max_size=3), st.sets(st.sampled_from(["user", "item", "seen", "tags"])))
    def test_skipped_features_look_nothing_up_and_leave_the_others_alone(self, parts, skipped):
        expected = [row | {name: [] for name in skipped} for rows in parts for row in rows]
        assert joined([columns_of(rows, skipped) for rows in parts]) == expected

    @many_examples
    @given(many_rows)
    def test_shapes_and_types_are_those_of_the_model(self, rows):
        batch = to_batch([Part(columns_of(rows), 0, len(rows))], SCHEMA.id_feature_names)
        num_rows = len(rows)
        assert batch.ids.keys() == ["user", "item", "seen", "tags"]
        assert batch.ids.stride() == num_rows
        assert (batch.ids.values().dtype, batch.ids.lengths().dtype) == (torch.int64, torch.int64)
        assert (batch.dense_BD.dtype, batch.dense_BD.shape) == (torch.float32, (num_rows, 3))
        assert (batch.labels_BT.dtype, batch.labels_BT.shape) == (torch.float32, (num_rows, 2))
        assert (batch.known_BT.dtype, batch.weight_B.dtype, batch.row_B.dtype) == (torch.bool, torch.float32, torch.int64)

    def test_a_batch_is_a_copy(self):
        rows = [{**PADDED_ROW, "user": [3], "item": [4], "seen": [5, 6], "tags": []}]
        columns = columns_of(rows)
        batch = to_batch([Part(columns, 0, 1)], SCHEMA.id_feature_names)
        for array in (columns.dense_ND, columns.labels_NT, columns.weight_N, columns.row_N, *(ids.value_M for ids in columns.ids_F)):
            array[...] = 7
        assert rows_of(batch) == rows
