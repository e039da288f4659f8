"""Everything that can be wrong in a log, and what happens: a sound log of two files, and CASES of what may be wrong with the second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from triptych.datasets.schema import DataSection, Feature, Label, Schema, TableIds

Columns = dict[str, pa.Array]
Change = Callable[[Columns], object]

FILE_ROWS, ROW_GROUP_ROWS = 40, 20
BAD_ROW = 25
"""Of the second of two files: in its second row group."""

REFUSED = "refused, naming file, row group and column"
REFUSED_COLUMN = "refused, naming file and column"
REFUSED_FILE = "refused, naming the file"
GROUP_OUT = "the row group is left out, its rows are counted"
FILE_OUT = "the file is left out and counted"
SAME = "the same"


def schema(on_bad_file: str = "fail") -> Schema:
    return Schema(
        DataSection(root=".", batch_size=16, workers=0, weight="w", on_bad_file=on_bad_file),
        tables=(TableIds(name="user", rows=1000), TableIds(name="page", rows=1000), TableIds(name="item", rows=60, ids="index")),
        features=(
            Feature(name="user", kind="id", table="user"),
            Feature(name="page", kind="id", table="page", default="none"),
            Feature(name="item", kind="id", table="item"),
            Feature(name="seen", kind="ids", table="item", max_length=3),
            Feature(name="price", kind="dense"),
            Feature(name="age", kind="dense", default=30),
            Feature(name="vector", kind="vector", size=2),
        ),
        labels=(
            Label(name="ctr", kind="binary", label="click"),
            Label(name="like", kind="binary", label="like", nulls="mask"),
            Label(name="dwell", kind="duration", label="dwell_ms", given="ctr", scale=0.001, cap=60),
        ),
    )


def sound(number: int) -> Columns:
    """One of the two files of the log. Row BAD_ROW is clicked."""
    first = number * FILE_ROWS
    rows = range(first, first + FILE_ROWS)
    return {
        "user": pa.array([row * 7 for row in rows], pa.int64()),
        "page": pa.array([("home", "é", "")[row % 3] for row in rows]),
        "item": pa.array([row % 60 for row in rows], pa.int64()),
        "seen": pa.array([[row % 60] * (row % 3) for row in rows], pa.list_(pa.int64())),
        "price": pa.array([row / 4 for row in rows]),
        "age": pa.array([20.0 + row for row in rows]),
        "vector": pa.array([[row / 2, 1.0] for row in rows], pa.list_(pa.float32())),
        "click": pa.array([row % 2 for row in rows], pa.int64()),
        "like": pa.array([0 for _ in rows], pa.int64()),
        "dwell_ms": pa.array([row * 1000 % 50_000 for row in rows], pa.int64()),
        "w": pa.array([1.0 + row % 2 for row in rows]),
    }


def untouched(columns: Columns) -> object:
    return columns


def at_bad_row(column: str, value: object, kind: pa.DataType | None = None) -> Change:
    """One value is another one."""

    def change(columns: Columns) -> object:
        values = columns[column].to_pylist()
        values[BAD_ROW] = value
        return columns | {column: pa.array(values, kind or columns[column].type)}

    return change


def as_type(column: str, kind: pa.DataType) -> Change:
    return lambda columns: columns | {column: columns[column].cast(kind)}


def all_values(column: str, make: Callable[[object], object]) -> Change:
    return lambda columns: columns | {column: pa.array([make(value) for value in columns[column].to_pylist()])}


def without(column: str) -> Change:
    return lambda columns: {name: values for name, values in columns.items() if name != column}


def twice(column: str) -> Change:
    return lambda columns: pa.Table.from_arrays([*columns.values(), columns[column]], [*columns, column])


def no_rows(columns: Columns) -> object:
    return pa.table(columns).slice(0, 0)


def first_bytes(count: int) -> Change:
    """The file is cut off."""
    return lambda columns: count


@dataclass(frozen=True)
class Case:
    """`change` is what is wrong with the second file. Refused: `says` is what the line says. Accepted: it reads as `same_as` would."""

    what: str
    name: str
    change: Change
    happens: str = REFUSED
    skip: str = GROUP_OUT
    says: tuple[str, ...] = ()
    same_as: Change | None = None
    first: Change = untouched
    """What the first file is."""
    capped: tuple[int, int] | None = None


def file_case(what: str, name: str, change: Change, *says: str) -> Case:
    return Case(what, name, change, REFUSED_COLUMN, FILE_OUT, says)


def fine(what: str, name: str, change: Change, happens: str, same_as: Change = untouched, capped: tuple[int, int] | None = None) -> Case:
    return Case(what, name, change, happens, SAME, same_as=same_as, capped=capped)


NAN, INFINITY = float("nan"), float("inf")
WHOLE_FLOATS = "ids that are floats with whole numbers, in all files"
OUTSIDE = "an id outside its `index` table, below 0 included"
DRIFT = "integers in one file; strings, floats, booleans or lists in the next"
LIST = "a list of ids that is null, empty or longer than `max_length`"
HUGE = "hashed ids below 0, up to 2^63 - 1, or unsigned above"

FLOAT_IDS = as_type("user", pa.float64())

CASES = [
    file_case("a column of the recipe is missing", "feature", without("price"), "no column 'price'", "feature 'price'"),
    file_case("a column of the recipe is missing", "label", without("click"), "no column 'click'", "task 'ctr'"),
    file_case("a column of the recipe is missing", "weight", without("w"), "no column 'w'", "data.weight"),
    file_case("a column of the recipe is there twice", "feature", twice("price"), "2 columns are named 'price'"),
    fine("other columns, another order of columns", "more", lambda c: {"z": c["user"]} | c, "not read"),
    fine("other columns, another order of columns", "order", lambda c: dict(reversed(c.items())), "not read"),
    fine("integers, or floats, of another width than in another file", "int32", as_type("user", pa.int32()), "read as equal"),
    fine("integers, or floats, of another width than in another file", "uint64", as_type("item", pa.uint64()), "read as equal"),
    fine("integers, or floats, of another width than in another file", "int8", as_type("click", pa.int8()), "read as equal"),
    fine("integers, or floats, of another width than in another file", "float32", as_type("price", pa.float32()), "read as equal"),
    fine("integers, or floats, of another width than in another file", "lists", as_type("seen", pa.list_(pa.int16())), "read as equal"),
    fine(
        "integers, or floats, of another width than in another file", "vector", as_type("vector", pa.list_(pa.float64())), "read as equal"
    ),
    file_case(DRIFT, "strings", as_type("user", pa.string()), "'user' holds strings, but integers in ", "one type"),
    file_case(DRIFT, "floats", as_type("user", pa.float64()), "'user' holds floats, but integers in ", "one type"),
    file_case(DRIFT, "booleans", as_type("click", pa.bool_()), "'click' holds booleans, but integers in ", "one type"),
    file_case(DRIFT, "dense", all_values("price", lambda v: 1), "'price' holds integers, but floats in ", "one type"),
    file_case(DRIFT, "lists", all_values("seen", lambda v: ["a"]), "'seen' holds lists of strings, but lists of integers in ", "one type"),
    file_case("a type that its feature or task cannot have", "text", as_type("price", pa.string()), "'price' is string", "needs numbers"),
    file_case("a type that its feature or task cannot have", "no list", all_values("seen", lambda v: 1), "'seen' is int64", "needs lists"),
    file_case("a type that its feature or task cannot have", "label", as_type("click", pa.string()), "'click' is string", "needs numbers"),
    Case("a null in a feature without a default", "id", at_bad_row("user", None), says=("'user'", "1 nulls", "give it a default")),
    Case("a null in a feature without a default", "dense", at_bad_row("price", None), says=("'price'", "1 nulls", "give it a default")),
    Case("a null in a feature without a default", "weight", at_bad_row("w", None), says=("'w'", "1 nulls")),
    Case("a null in a feature without a default", "vector", at_bad_row("vector", None), says=("'vector'", "exactly 2 numbers")),
    fine("a null in a feature with a default", "id", at_bad_row("page", None), "becomes the default", at_bad_row("page", "none")),
    fine("a null in a feature with a default", "dense", at_bad_row("age", None), "becomes the default", at_bad_row("age", 30.0)),
    fine(
        "a null in a feature with a default",
        "all",
        all_values("age", lambda v: None),
        "becomes the default",
        all_values("age", lambda v: 30.0),
    ),
    Case("a null in a label", "binary", at_bad_row("click", None), says=("'click'", "1 nulls", 'nulls = "mask"')),
    Case("a null in a label", "duration", at_bad_row("dwell_ms", None), says=("'dwell_ms'", "1 nulls", 'nulls = "mask"')),
    Case("NaN, infinity, or a number too large for float32", "NaN", at_bad_row("price", NAN), says=("'price'", "NaN", "first row 5")),
    Case("NaN, infinity, or a number too large for float32", "infinity", at_bad_row("price", -INFINITY), says=("'price'", "infinity")),
    Case("NaN, infinity, or a number too large for float32", "large", at_bad_row("price", 1e39), says=("'price'", "infinity")),
    Case("NaN, infinity, or a number too large for float32", "default", at_bad_row("age", NAN), says=("'age'", "NaN")),
    Case("NaN, infinity, or a number too large for float32", "vector", at_bad_row("vector", [1.0, NAN]), says=("'vector'", "NaN")),
    Case("NaN, infinity, or a number too large for float32", "weight", at_bad_row("w", INFINITY), says=("'w'", "data.weight", "infinity")),
    Case("a weight below 0", "weight", at_bad_row("w", -0.5), says=("'w'", "data.weight", "-0.5")),
    Case("a binary label that is neither 0 nor 1", "2", at_bad_row("click", 2), says=("'click'", "must be 0 or 1, but holds 2")),
    Case("a binary label that is neither 0 nor 1", "-1", at_bad_row("like", -1), says=("'like'", "must be 0 or 1, but holds -1")),
    fine("a duration below 0", "dwell", at_bad_row("dwell_ms", -5), "becomes 0, counted", at_bad_row("dwell_ms", 0), (1, 0)),
    fine(
        "a duration above the cap",
        "dwell",
        at_bad_row("dwell_ms", 2**62),
        "cut to the cap, counted",
        at_bad_row("dwell_ms", 60_000),
        (0, 1),
    ),
    Case(OUTSIDE, "last", at_bad_row("item", 60), says=("'item'", "id 60 is outside table 'item' of 60 rows", "raise its rows")),
    Case(OUTSIDE, "negative", at_bad_row("item", -1), says=("'item'", "id -1 is outside", "raise its rows")),
    Case(OUTSIDE, "largest", at_bad_row("item", 2**63 - 1), says=("'item'", "id 9223372036854775807 is outside")),
    Case(OUTSIDE, "in a list", at_bad_row("seen", [3, 60]), says=("'seen'", "id 60 is outside", "raise its rows")),
    fine(HUGE, "negative", at_bad_row("user", -3), "read", at_bad_row("user", 2**64 - 3, pa.uint64())),
    fine(HUGE, "largest", at_bad_row("user", 2**63 - 1), "read", at_bad_row("user", 2**63 - 1, pa.uint64())),
    fine(HUGE, "uint64", at_bad_row("user", 2**63 + 5, pa.uint64()), "read", at_bad_row("user", 5 - 2**63)),
    fine(LIST, "null", at_bad_row("seen", None), "no ids, or its last `max_length`", at_bad_row("seen", [])),
    fine(LIST, "long", at_bad_row("seen", [9, 8, 7, 6, 5]), "no ids, or its last `max_length`", at_bad_row("seen", [7, 6, 5])),
    Case("a null in a list", "ids", at_bad_row("seen", [1, None]), says=("'seen'", "1 nulls")),
    Case("a null in a list", "vector", at_bad_row("vector", [1.0, None]), says=("'vector'", "1 nulls")),
    Case("a vector of another length", "short", at_bad_row("vector", [1.0]), says=("'vector'", "exactly 2 numbers")),
    Case("a vector of another length", "empty", at_bad_row("vector", []), says=("'vector'", "exactly 2 numbers")),
    fine("a file without rows", "file", no_rows, "no matter"),
    Case("a file that is cut off, empty or no parquet", "cut off", first_bytes(2000), REFUSED_FILE, FILE_OUT, ("not a readable parquet",)),
    Case("a file that is cut off, empty or no parquet", "empty", first_bytes(0), REFUSED_FILE, FILE_OUT, ("the file is empty",)),
]
CASES += [
    Case(WHOLE_FLOATS, "ids", FLOAT_IDS, "read as integers", SAME, same_as=untouched, first=FLOAT_IDS),
    Case(
        "a fraction as an id", "ids", at_bad_row("user", 3.5, pa.float64()), says=("'user'", "ids must be whole numbers"), first=FLOAT_IDS
    ),
]  # fmt: skip
OTHERS = [
    ("a flipped bit in a page, in files with page checksums", "refused, naming file and row group", GROUP_OUT),
    ('a null in a label with `nulls = "mask"`', "the row teaches this task nothing", SAME),
    ("strings as ids of an `index` table", REFUSED, "refused: no row is left"),
    ("no rows in any file, or no file that can be read", "refused", "refused"),
    ("a file vanished, or changed, while training reads", REFUSED_FILE, "its row groups are left out, their rows are counted"),
    ("a file was changed, added, removed or renamed between stop and resume", "refused", "refused"),
]
"""Rows of the table that have tests of their own, in test_bad_input.py and test_damaged_files.py."""


def markdown_table() -> str:
    """As the README has it."""
    rows = [(case.what, case.happens, case.skip) for case in CASES] + OTHERS
    lines = [f"| {' | '.join(row)} |" for row in dict.fromkeys(rows)]
    return "\n".join(['| in the log | what happens | with `on_bad_file = "skip"` |', "|---|---|---|", *lines])
