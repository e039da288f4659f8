"""Decoded rows are permuted, cut, shortened and joined exactly as Python lists of rows would be."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.columns import NO_ID, Columns, Jagged, empty_columns, to_batch
from triptych.datasets.schema import DataSection, Feature, Label, Schema, TableIds

many_examples = settings(deadline=None, max_examples=100)
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


def jagged(lists):
    return Jagged.from_lengths(
        np.array([v for values in lists for v in values], np.int64), np.array([len(values) for values in lists], int)
    )


def as_lists(jagged):
    assert jagged.offsets_N1[0] == 0 and jagged.offsets_N1[-1] == len(jagged.value_M)
    return [jagged.value_M[start:stop].tolist() for start, stop in zip(jagged.offsets_N1[:-1], jagged.offsets_N1[1:], strict=True)]


def stretch_of(lists):
    """A strategy of (start, stop) within these lists."""
    return st.tuples(st.integers(0, len(lists)), st.integers(0, len(lists))).map(sorted)


small_floats = st.integers(-8, 8).map(lambda eighth: eighth / 8)
one_row = st.fixed_dictionaries(
    {
        "user": st.lists(st.integers(0, 99), max_size=1),  # no id, or one
        "item": st.lists(st.integers(0, 99), max_size=1),
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


def columns_of(rows):
    def array(name, width, kind):
        return np.array([row[name] for row in rows], kind).reshape(len(rows), width)

    return Columns(
        ids_FN=np.array([[row[name][0] if row[name] else NO_ID for row in rows] for name in ("user", "item")], np.int64),
        lists=[jagged([row[name] for row in rows]) for name in ("seen", "tags")],
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
    return rows_of(to_batch(parts, SCHEMA.id_feature_names))


class TestJagged:
    @many_examples
    @given(lists_of_ids)
    def test_lists_survive_and_lengths_are_theirs(self, lists):
        assert as_lists(jagged(lists)) == lists
        assert jagged(lists).lengths_N.tolist() == [len(values) for values in lists]

    @many_examples
    @given(lists_of_ids, st.data())
    def test_take_equals_indexing_a_list(self, lists, data):
        rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12)) if lists else []
        assert as_lists(jagged(lists).take(np.array(rows, np.int64))) == [lists[row] for row in rows]

    @many_examples
    @given(lists_of_ids, st.data())
    def test_cut_equals_slicing_a_list(self, lists, data):
        start, stop = data.draw(stretch_of(lists))
        assert as_lists(jagged(lists).cut(start, stop)) == lists[start:stop]

    @many_examples
    @given(lists_of_ids, st.integers(1, 6))
    def test_last_keeps_the_end_of_every_list(self, lists, max_length):
        assert as_lists(jagged(lists).last(max_length)) == [values[-max_length:] for values in lists]

    @many_examples
    @given(lists_of_ids, st.integers(1, 6), st.data())
    def test_operations_compose(self, lists, max_length, data):
        start, stop = data.draw(stretch_of(lists))
        rows = data.draw(st.permutations(range(stop - start)))
        result = jagged(lists).cut(start, stop).take(np.array(rows, np.int64)).last(max_length)
        assert as_lists(result) == [lists[start:stop][row][-max_length:] for row in rows]

    def test_empty_lists(self):
        assert as_lists(Jagged.empty(3)) == [[], [], []]
        assert as_lists(Jagged.empty(0)) == []


class TestColumns:
    @many_examples
    @given(many_rows, st.data())
    def test_take_equals_indexing_rows(self, rows, data):
        taken = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
        assert joined([columns_of(rows).take(np.array(taken))]) == [rows[i] for i in taken]

    @many_examples
    @given(many_rows, st.data())
    def test_cut_equals_slicing_rows(self, rows, data):
        start, stop = data.draw(stretch_of(rows))
        cut = columns_of(rows).cut(start, stop)
        assert len(cut) == stop - start
        assert joined([cut]) == rows[start:stop]

    def test_empty_columns_are_padded_rows(self):
        assert joined([empty_columns(2, SCHEMA)]) == [PADDED_ROW] * 2
        assert joined([empty_columns(0, SCHEMA)]) == []


class TestToBatch:
    @many_examples
    @given(st.lists(many_rows, min_size=1, max_size=4), st.integers(0, 3))
    def test_parts_and_padding_join_row_after_row(self, parts, padding):
        batch = joined([columns_of(rows) for rows in parts] + [empty_columns(padding, SCHEMA)])
        assert batch == [row for rows in parts for row in rows] + [PADDED_ROW] * padding

    @many_examples
    @given(st.lists(many_rows, min_size=1, max_size=3), st.sets(st.sampled_from(["user", "item", "seen", "tags"])))
    def test_skipped_features_look_nothing_up_and_leave_the_others_alone(self, parts, skipped):
        parts = [[row | {name: [] for name in skipped} for row in rows] for rows in parts]
        assert joined([columns_of(rows) for rows in parts]) == [row for rows in parts for row in rows]

    @many_examples
    @given(many_rows)
    def test_shapes_and_types_are_those_of_the_model(self, rows):
        batch = to_batch([columns_of(rows)], SCHEMA.id_feature_names)
        num_rows = len(rows)
        assert batch.ids.keys() == ["user", "item", "seen", "tags"]
        assert batch.ids.stride() == num_rows
        assert (batch.ids.values().dtype, batch.ids.lengths().dtype) == (torch.int64, torch.int64)
        assert (batch.dense_BD.dtype, batch.dense_BD.shape) == (torch.float32, (num_rows, 3))
        assert (batch.labels_BT.dtype, batch.labels_BT.shape) == (torch.float32, (num_rows, 2))
        assert (batch.known_BT.dtype, batch.weight_B.dtype, batch.row_B.dtype) == (torch.bool, torch.float32, torch.int64)
