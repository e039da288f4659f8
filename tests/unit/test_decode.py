"""Rows of a slice become columns: right values are read as written, wrong ones end in one line that names file, row group and column."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small import as_lists
from triptych.datasets.fitted import Fitted
from triptych.datasets.ids import string_codes
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.files import read_slices
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

NAN, INF = float("nan"), float("inf")
GOOD = {
    "user": [7, 8, 7, 9],
    "page": ["a", "b", "", "é"],
    "item": [0, 1, 2, 9],
    "age": [17, 18, 40, 99],
    "seen": [[1, 2, 3], [], [4], [5, 6]],
    "tags": [["x", "y"], ["x"], [], ["z"]],
    "price": [0.0, 1.0, 2.5, 10.0],
    "vector": [[0.5, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]],
    "click": [1, 0, 1, 1],
    "buy": [0, 0, 1, 0],
    "dwell_ms": [1000, 0, 90_000, 250],
    "w": [1.0, 2.0, 0.0, 0.5],
}


def schema(**changes):
    """The schema of GOOD; `changes` are keys of its features by name."""
    features = {
        "user": {"kind": "id", "table": "word"},
        "page": {"kind": "id", "table": "word"},
        "item": {"kind": "id", "table": "item"},
        "band": {"kind": "id", "table": "band", "column": "age", "buckets": (18, 40)},
        "seen": {"kind": "ids", "table": "item", "max_length": 2},
        "tags": {"kind": "ids", "table": "word"},
        "vector": {"kind": "vector", "size": 2, "scale": 2.0},
        "price": {"kind": "dense", "transform": "log1p"},
    }
    return Schema(
        DataSection(root=".", weight="w"),
        tables=(TableIds(name="word", rows=2**40), TableIds(name="item", rows=10, ids="index"), TableIds(name="band", rows=3, ids="index")),
        features=tuple(Feature(name=name, **(keys | changes.get(name, {}))) for name, keys in features.items()),
        labels=(
            Label(name="ctr", kind="binary", label="click"),
            Label(name="cvr", kind="binary", label="buy", given="ctr"),
            Label(name="dwell", kind="duration", label="dwell_ms", scale=0.001, cap=60),
        ),
    )


SCHEMA = schema()


def write(path, **changes):
    """A file of GOOD with some columns replaced, or dropped where the replacement is `...`."""
    columns = {name: values for name, values in (GOOD | changes).items() if values is not ...}
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


def decoded(path, schema, labels=True, skip_features=()):
    """The columns of every row group, and by task how many durations were cut to 0 and to the cap."""
    decoder = Decoder(schema, Fitted(), labels=labels, skip_features=skip_features)
    slices = list_slices(schema, [path], labels=labels, skip_features=skip_features).slices
    parts = [decoder.decode(table, str(part), part.first_row) for part, table in read_slices(schema, slices, decoder.columns)]
    return [rows for rows, _ in parts], [capped for _, capped in parts]


def read(path, schema=SCHEMA, labels=True, skip_features=()):
    """All rows of a file as columns of Python values, features by name."""
    parts, _ = decoded(path, schema, labels, skip_features)
    rows = {}
    for f, feature in enumerate(schema.id_features):
        values = [row for part in parts for row in as_lists(part.ids_F[f])]
        rows[feature.name] = values if feature.kind == "ids" else [id_ for ids in values for id_ in ids]
    rows["vector"] = [row for part in parts for row in part.dense_ND[:, :2].tolist()]
    rows["price"] = [row for part in parts for row in part.dense_ND[:, 2].tolist()]
    for name in ("labels_NT", "known_NT", "weight_N", "row_N"):
        rows[name] = [row for part in parts for row in getattr(part, name).tolist()]
    return rows


def refusal(path, schema=SCHEMA):
    """The message that refuses a file: one line that begins with the file."""
    with pytest.raises(InputError) as refused:
        read(path, schema)
    message = str(refused.value)
    assert "\n" not in message and message.startswith(path)
    return message.removeprefix(path)


def codes(strings):
    return (string_codes(pa.array(strings)) % np.uint64(2**40)).tolist()


def log1p(numbers):
    return [float(np.float32(math.log1p(number))) for number in numbers]


DICTIONARY = pa.array(GOOD["page"]).dictionary_encode()


class TestRightInput:
    def test_every_column_is_read_as_written(self, tmp_path):
        rows = read(write(tmp_path / "f.parquet"))
        words = codes(["", "a", "b", "é", "x", "y", "z"])
        assert rows["page"] == [words[1], words[2], words[0], words[3]]
        assert rows["item"] == GOOD["item"]
        assert rows["band"] == [0, 1, 2, 2]
        assert rows["seen"] == [[2, 3], [], [4], [5, 6]]
        assert rows["tags"] == [[words[4], words[5]], [words[4]], [], [words[6]]]
        assert rows["price"] == log1p(GOOD["price"])
        assert rows["vector"] == [[2 * number for number in numbers] for numbers in GOOD["vector"]]
        assert rows["labels_NT"] == [[1, 0, 1], [0, 0, 0], [1, 1, 60], [1, 0, 0.25]]
        assert rows["known_NT"] == [[True, True, True], [True, False, True], [True, True, True], [True, True, True]]
        assert rows["weight_N"] == GOOD["w"]
        assert rows["row_N"] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        "same",
        [
            pytest.param({"page": pa.array(GOOD["page"], pa.large_string())}, id="large strings"),
            pytest.param({"page": DICTIONARY}, id="a dictionary"),
            pytest.param({"page": pa.chunked_array([DICTIONARY[:1], pa.array(GOOD["page"][1:]).dictionary_encode()])}, id="dictionaries"),
            pytest.param({"user": pa.array(GOOD["user"], pa.float64()), "item": pa.array(GOOD["item"], pa.float32())}, id="whole floats"),
            pytest.param({"page": pa.array(GOOD["page"], pa.string_view())}, id="string views"),
            pytest.param({"tags": pa.array(GOOD["tags"], pa.list_(pa.string_view()))}, id="lists of string views"),
            pytest.param({"tags": pa.array(GOOD["tags"], pa.list_(pa.dictionary(pa.int8(), pa.string())))}, id="lists of a dictionary"),
            pytest.param({"seen": pa.array(GOOD["seen"], pa.large_list(pa.uint64()))}, id="lists of unsigned ids"),
            pytest.param({"age": pa.array(GOOD["age"], pa.float32())}, id="buckets of floats"),
            pytest.param({"seen": pa.array(GOOD["seen"], pa.large_list(pa.int16()))}, id="large lists"),
            pytest.param({"seen": [[1, 2, 3], None, [4], [5, 6]]}, id="a null list is an empty one"),
            pytest.param({"vector": pa.array(GOOD["vector"], pa.list_(pa.float32(), 2))}, id="fixed-size lists"),
            pytest.param({"click": [True, False, True, True], "buy": [0.0, 0.0, 1.0, 0.0]}, id="labels of any type"),
            *(pytest.param({"buy": [0, label, 1, 0]}, id=f"label {label} where its given label is 0") for label in (None, 7.0, NAN)),
            pytest.param({"extra": ["not read"] * 4, "w": pa.array(GOOD["w"], pa.float16())}, id="an extra column"),
        ],
    )
    def test_types_that_hold_the_same_values_read_the_same(self, tmp_path, same):
        assert read(write(tmp_path / "same.parquet", **same)) == read(write(tmp_path / "good.parquet"))

    @pytest.mark.parametrize("kind", [pa.list_(pa.int64(), 2), pa.list_(pa.int64()), pa.large_list(pa.int64())], ids=str)
    def test_lists_of_one_size_and_null_lists(self, tmp_path, kind):
        seen = pa.array([[1, 2], None, [3, 4], None], kind)
        assert read(write(tmp_path / "f.parquet", seen=seen))["seen"] == [[1, 2], [], [3, 4], []]

    @pytest.mark.parametrize(
        "nothing", [pa.nulls(4), [None] * 4, [[]] * 4, [[], None, [], []]], ids=["null type", "nulls", "empty", "both"]
    )
    def test_lists_that_are_all_empty(self, tmp_path, nothing):
        rows = read(write(tmp_path / "f.parquet", seen=nothing, tags=nothing))
        assert rows["seen"] == rows["tags"] == [[]] * 4

    def test_defaults_stand_for_nulls(self, tmp_path):
        filled = schema(user={"default": 5}, page={"default": "b"}, item={"default": 3}, band={"default": 20}, price={"default": 2})
        nulls = {
            "user": [None, 8, 7, None],
            "page": pa.array(["a", None, None, "é"]).dictionary_encode(),
            "item": pa.array([None, 1.0, 2.0, 9.0]),
            "age": [17, None, 40, 99],
            "price": [None, 1.0, None, 10.0],
        }
        whole = {
            "user": [5, 8, 7, 5],
            "page": ["a", "b", "b", "é"],
            "item": [3, 1, 2, 9],
            "age": [17, 20, 40, 99],
            "price": [2.0, 1, 2, 10],
        }
        assert read(write(tmp_path / "nulls.parquet", **nulls), filled) == read(write(tmp_path / "whole.parquet", **whole))
        all_defaults = {"user": [5] * 4, "page": ["b"] * 4, "item": [3] * 4, "age": [20] * 4, "price": [2.0] * 4}
        empty = write(tmp_path / "empty.parquet", **{name: pa.nulls(4) for name in nulls})
        assert read(empty, filled) == read(write(tmp_path / "filled.parquet", **all_defaults))

    def test_large_integers_are_dense_numbers_and_labels_too(self, tmp_path):
        large = [2**60 + 1, 0, 2**53 + 1, 1]
        rows = read(write(tmp_path / "f.parquet", price=large, dwell_ms=large, age=large, w=large))
        assert rows["price"] == log1p(large) and rows["band"] == [2, 0, 2, 0]
        assert rows["weight_N"] == [float(np.float32(number)) for number in large]

    def test_a_file_without_labels_or_some_features(self, tmp_path):
        path = write(tmp_path / "f.parquet", click=..., buy=..., dwell_ms=..., w=..., user=..., tags=..., vector=...)
        rows, whole = read(path, labels=False, skip_features=["user", "tags", "vector"]), read(write(tmp_path / "whole.parquet"))
        skipped = {"user": [], "tags": [[]] * 4, "vector": [[0, 0]] * 4}
        unlabelled = {"labels_NT": [[0] * 3] * 4, "known_NT": [[False] * 3] * 4, "weight_N": [1] * 4}
        assert rows == whole | skipped | unlabelled

    def test_row_groups_without_rows(self, tmp_path):
        table = pa.table(GOOD)
        with pq.ParquetWriter(tmp_path / "f.parquet", table.schema) as writer:
            for rows in (table[:0], table[:3], table[:0], table[3:]):
                writer.write_table(rows)
        assert read(str(tmp_path / "f.parquet")) == read(write(tmp_path / "whole.parquet"))


NOT_FINITE = "holds NaN, infinity or what becomes one in 1 rows, first row 1"
WRONG_SIZE = "must hold exactly 2 numbers in every row"
DROP_THEM = 'drop those rows, or set its nulls = "mask"'
HASH_INSTEAD = 'raise its rows or use ids = "hash"'


class TestWrongValues:
    """The wrong value is in the last of four rows, the second row of row group 1."""

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            *((c, None, f"column '{c}' (feature '{c}') has 1 nulls; give it a default") for c in ("user", "page", "item", "price")),
            ("age", None, "column 'age' (feature 'band') has 1 nulls; give it a default"),
            *(("user", v, "column 'user' (feature 'user'): ids must be whole numbers or strings (...)") for v in (1.5, NAN)),
            ("item", 10, f"column 'item' (feature 'item'): id 10 is outside table 'item' of 10 rows (1 such values); {HASH_INSTEAD}"),
            (
                "seen",
                [3, -1, 4],
                f"column 'seen' (feature 'seen'): id -1 is outside table 'item' of 10 rows (1 such values); {HASH_INSTEAD}",
            ),
            ("seen", [1, None, None], "lists in column 'seen' (feature 'seen') hold 2 nulls"),
            ("tags", ["x", None], "lists in column 'tags' (feature 'tags') hold 1 nulls"),
            ("vector", [1.0, None], "lists in column 'vector' (feature 'vector') hold 1 nulls"),
            *(("vector", v, f"column 'vector' (feature 'vector') {WRONG_SIZE}") for v in ([1.0], [1.0] * 3, [], None)),
            *(("vector", [0.0, v], f"column 'vector' (feature 'vector') {NOT_FINITE}") for v in (NAN, INF, 1e39, 2e38, 1e308)),
            *(("price", v, f"column 'price' (feature 'price') {NOT_FINITE}") for v in (NAN, INF, -INF, -1.0, -2.0)),
            ("age", NAN, f"column 'age' (feature 'band') {NOT_FINITE}"),
            *((label.label, None, f"label '{label.label}' of task '{label.name}' has 1 nulls; {DROP_THEM}") for label in SCHEMA.labels),
            *(("click", v, f"column 'click' (task 'ctr') {NOT_FINITE}") for v in (NAN, INF)),
            *(("dwell_ms", v, f"column 'dwell_ms' (task 'dwell') {NOT_FINITE}") for v in (NAN, INF, 1e39)),
            *(("click", v, f"label 'click' of task 'ctr' must be 0 or 1, but holds {v}") for v in (2, -1, 0.5)),
            ("w", None, "column 'w' (data.weight) has 1 nulls"),
            ("w", -0.5, "column 'w' (data.weight) holds the negative weight -0.5"),
            *(("w", v, f"column 'w' (data.weight) {NOT_FINITE}") for v in (NAN, INF, 1e39)),
        ],
    )
    def test_it_is_named_with_its_row_group_and_column(self, tmp_path, column, value, message):
        said = refusal(write(tmp_path / "f.parquet", **{column: [*GOOD[column][:3], value]}))
        start, _, end = message.partition("...")  # Arrow's own words
        assert said.startswith(f": row group 1: {start}") and said.endswith(end) and (end or said == f": row group 1: {start}")

    def test_vectors_of_wrong_sizes_that_add_up(self, tmp_path):
        path = write(tmp_path / "f.parquet", vector=[[1.0], [1.0] * 3] * 2)
        assert refusal(path) == f": row group 0: column 'vector' (feature 'vector') {WRONG_SIZE}"

    def test_a_duration_that_its_scale_makes_too_large(self, tmp_path):
        scaled = replace(SCHEMA, labels=(Label(name="dwell", kind="duration", label="dwell_ms", scale=1e37),))
        path = write(tmp_path / "f.parquet", dwell_ms=[1, 2, 3, 1000])
        assert refusal(path, scaled) == f": row group 1: column 'dwell_ms' (task 'dwell') {NOT_FINITE}"

    @pytest.mark.parametrize("default", ["nobody", 0.5])
    def test_a_default_that_is_no_value_of_the_column(self, tmp_path, default):
        message = refusal(write(tmp_path / "f.parquet", user=[1, 2, None, 4]), schema(user={"default": default}))
        assert message == f": row group 1: column 'user' (feature 'user') is int64; default {default!r} does not fit"
