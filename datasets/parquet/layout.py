"""What columns a recipe reads, what types they may have, and that all files of a run agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schema import Feature, InputError, Schema, nearest

WANTED = {"id": "integers or strings", "ids": "lists of integers or strings", "dense": "numbers", "vector": "lists of numbers"}
NOTHING = "nothing"
"""The family of a column that holds only nulls."""


def value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_moment(kind: pa.DataType) -> bool:
    return pa.types.is_date(kind) or pa.types.is_timestamp(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_offsets(lists: pa.Array) -> np.ndarray:
    """int32 or int64 [N + 1], from 0 on; a null list is empty."""
    if lists.null_count or pa.types.is_fixed_size_list(lists.type):
        lengths_N = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        return np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])
    offsets_N1 = lists.offsets.to_numpy()
    return offsets_N1 if offsets_N1[0] == 0 else offsets_N1 - offsets_N1[0]


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def family(kind: pa.DataType) -> str:
    """Types of one family hold the same values in other widths: files may differ within one."""
    kind = value_type(kind)
    if is_list(kind):
        return f"lists of {family(kind.value_type)}"
    for name, belongs in (
        ("integers", pa.types.is_integer), ("floats", pa.types.is_floating), ("booleans", pa.types.is_boolean), ("strings", is_text),
        ("moments", is_moment), (NOTHING, pa.types.is_null),
    ):  # fmt: skip
        if belongs(kind):
            return name
    return str(kind)


def agree(one: str, other: str) -> bool:
    """Whether a column may be of one family in one file and of another in the next."""
    lists = "lists of "
    if NOTHING in (one, other):
        return True
    return one == other or (one.startswith(lists) and other.startswith(lists) and lists + NOTHING in (one, other))


@dataclass
class ColumnTypes:
    """The family of every column read so far, and the file that showed it first."""

    families: dict[str, tuple[str, str]] = field(default_factory=dict)

    def copy(self) -> ColumnTypes:
        return ColumnTypes(dict(self.families))

    def prefer(self, files: Sequence[tuple[str, int, Mapping[str, str]]]) -> None:
        """Of columns that are not known yet, take the family that most rows of the files (path, rows, families) have."""
        votes: dict[str, dict[str, tuple[int, str]]] = {}
        for path, rows, found in files:
            for column, its_family in found.items():
                before, first_path = votes.setdefault(column, {}).get(its_family, (0, path))
                votes[column][its_family] = (before + rows, first_path)
        for column, families in votes.items():
            its_family, (_, path) = max(families.items(), key=lambda vote: (not vote[0].endswith(NOTHING), vote[1][0]))
            self.families.setdefault(column, (its_family, path))

    def add(self, path: str, found: Mapping[str, str]) -> None:
        """Take in one file's columns.

        Raises:
            InputError: a column is of another family than in a file before.
        """
        for column, its_family in found.items():
            known, first_path = self.families.get(column, (NOTHING, path))
            if not agree(known, its_family):
                raise InputError(
                    f"{path}: column '{column}' holds {its_family}, but {known} in {first_path}; write both with one type "
                    "(widths of one type may differ)"
                )
        # A refused file, which a run may skip, leaves no trace.
        for column, its_family in found.items():
            known, _ = self.families.get(column, (NOTHING, path))
            if column not in self.families or (known.endswith(NOTHING) and its_family not in (NOTHING, known)):
                self.families[column] = (its_family, path)


def _fits(feature: Feature, kind: pa.DataType) -> bool:
    kind = value_type(kind)
    if pa.types.is_null(kind):
        return feature.default is not None or feature.kind == "ids"
    if feature.kind in ("ids", "vector"):
        if not is_list(kind):
            return False
        # Lists that are all empty have values of type null.
        values = value_type(kind.value_type)
        return is_number(values) or (feature.kind == "ids" and (is_text(values) or pa.types.is_null(values)))
    return is_number(kind) or (feature.kind == "id" and feature.buckets is None and is_text(kind))


def _is_label_or_null(kind: pa.DataType) -> bool:
    return is_number(kind) or pa.types.is_null(kind)


def _is_group(kind: pa.DataType) -> bool:
    kind = value_type(kind)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind) or is_moment(kind)


def _is_scenario(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(value_type(kind))


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_moment(kind)


def _check_label_columns(schema: Schema, path: str, columns: pa.Schema) -> list[str]:
    data = schema.data
    wanted: list[tuple[str, str, Callable[[pa.DataType], bool], str]] = [
        (label.label, f"task '{label.name}'", _is_label_or_null if label.nulls == "mask" else is_number, "numbers")
        for label in schema.labels
    ]
    wanted += [
        (column, key, fits, wants)
        for column, key, fits, wants in (
            (data.weight, "data.weight", is_number, "numbers"),
            (data.group, "data.group", _is_group, "integers, strings, booleans, dates or timestamps"),
            (data.scenario, "data.scenario", _is_scenario, "one value a row"),
            (data.time, "data.time", _is_time, "numbers, dates or timestamps"),
        )
        if column is not None
    ]
    for column, asked_by, fits, wants in wanted:
        kind = _one_column(path, columns, column, asked_by).type
        if not fits(kind):
            raise InputError(f"{path}: column '{column}' is {kind}, but {asked_by} needs {wants}")
    return [column for column, *_ in wanted]


def _one_column(path: str, columns: pa.Schema, column: str, asked_by: str) -> pa.Field:
    count = columns.names.count(column)
    if count == 0:
        raise InputError(f"{path}: no column '{column}' for {asked_by}{nearest(column, columns.names)}")
    if count > 1:
        raise InputError(f"{path}: {count} columns are named '{column}', which {asked_by} reads")
    return columns.field(column)


def check_columns(schema: Schema, path: str, columns: pa.Schema, *, labels: bool, skip_features: Collection[str] = ()) -> dict[str, str]:
    """Every column the recipe reads is there once with a type that fits; others do not matter.

    Returns:
        The family of each of them.
    Raises:
        InputError: names the column, the file, what is there and the nearest name.
    """
    read = []
    for feature in schema.features:
        if feature.name in skip_features:
            continue
        kind = _one_column(path, columns, feature.column, f"feature '{feature.name}'").type
        if not _fits(feature, kind):
            wants = "numbers" if feature.buckets is not None else WANTED[feature.kind]
            raise InputError(
                f"{path}: column '{feature.column}' is {kind}, but feature '{feature.name}' of kind '{feature.kind}' needs {wants}"
            )
        read.append(feature.column)
    if labels:
        read += _check_label_columns(schema, path, columns)
    return {column: family(columns.field(column).type) for column in dict.fromkeys(read)}
