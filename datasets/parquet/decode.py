"""Rows of a slice -> Columns: checked, vectorised. Every error names file, row group and column."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..columns import Columns, Jagged, unlabelled
from ..fitted import Fitted
from ..ids import bucketise, table_rows
from ..schema import Feature, InputError, Label, Schema
from .layout import list_offsets

_BLOCK_ROWS = 1 << 12
_LARGEST = float(np.finfo(np.float32).max)


def plain_column(table: pa.Table, column: str) -> pa.Array:
    """A column in one piece, without a dictionary."""
    chunks = table.column(column).chunks
    # Joining one chunk would copy it.
    values = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], table.column(column).type)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _filled(values: pa.Array, feature: Feature, where: str) -> pa.Array:
    if values.null_count == 0:
        return values
    if feature.default is None:
        raise InputError(f"{where}: column '{feature.column}' (feature '{feature.name}') has {values.null_count} nulls; give it a default")
    try:
        default = pa.scalar(feature.default)
        kind = default.type if pa.types.is_null(values.type) else values.type
        return values.cast(kind).fill_null(default.cast(kind))
    except pa.ArrowException as error:
        raise InputError(
            f"{where}: column '{feature.column}' (feature '{feature.name}') is {values.type}; default {feature.default!r} does not fit"
        ) from error


def _floats(values: pa.Array) -> np.ndarray:
    """float64 [N], NaN for null; float32 stays."""
    if pa.types.is_float32(values.type) and values.null_count == 0:
        return values.to_numpy()
    # A safe cast refuses integers above 2^53.
    return pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _finite(numbers: np.ndarray, column: str, asked_by: str, where: str) -> np.ndarray:
    """The numbers, which a float32 holds too."""
    if numbers.size and not (numbers.min() >= -_LARGEST and numbers.max() <= _LARGEST):
        bad = np.flatnonzero(~(np.abs(numbers) <= _LARGEST).all(axis=tuple(range(1, numbers.ndim))))
        raise InputError(
            f"{where}: column '{column}' ({asked_by}) holds NaN, infinity or what becomes one in {len(bad)} rows, first row {bad[0]}"
        )
    return numbers


def raw_ids(values: pa.Array, feature: Feature, where: str) -> pa.Array:
    """The ids of an id column, without nulls; a list column's all in one.

    Raises:
        InputError: nulls without a default, nulls in lists, numbers that are not finite where they are cut into buckets.
    """
    if feature.kind == "ids":
        flat = pc.list_flatten(values)
        if flat.null_count:
            raise InputError(f"{where}: lists in column '{feature.column}' (feature '{feature.name}') hold {flat.null_count} nulls")
        return flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat
    values = _filled(values, feature, where)
    if feature.buckets is not None:
        return bucketise(_finite(_floats(values), feature.column, f"feature '{feature.name}'", where), feature)
    return values


def raw_numbers(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    """float32 or float64 [N, width]; NaN for a null.

    Raises:
        InputError: lists of another length.
    """
    if feature.kind == "vector":
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        if not (lengths == feature.size).all():
            raise InputError(
                f"{where}: column '{feature.column}' (feature '{feature.name}') must hold exactly {feature.size} numbers in every row"
            )
        values = pc.list_flatten(values)
        if values.null_count:
            raise InputError(f"{where}: lists in column '{feature.column}' (feature '{feature.name}') hold {values.null_count} nulls")
    return _floats(values).reshape(-1, feature.width)


def _label(values: pa.Array, label: Label, known_N: np.ndarray, where: str) -> tuple[np.ndarray, tuple[int, int]]:
    """float64 [N], 0 where unknown, and how many durations were below 0 and above the cap."""
    asked_by = f"task '{label.name}'"
    numbers = _floats(values)
    missing = int((values.is_null().to_numpy(zero_copy_only=False) & known_N).sum()) if values.null_count else 0
    if missing:
        raise InputError(f"{where}: label '{label.label}' of {asked_by} has {missing} nulls; drop those rows, or set its nulls = \"mask\"")
    numbers = _finite(np.where(known_N, numbers, 0.0), label.label, asked_by, where)
    if label.kind == "binary":
        wrong_N = (numbers != 0) & (numbers != 1)
        if wrong_N.any():
            raise InputError(f"{where}: label '{label.label}' of {asked_by} must be 0 or 1, but holds {numbers[wrong_N][0]:g}")
        return numbers, (0, 0)
    seconds = _finite(numbers.astype(np.float64) * label.scale, label.label, asked_by, where)
    cap = np.inf if label.cap is None else label.cap
    return np.clip(seconds, 0.0, cap), (int((seconds < 0).sum()), int((seconds > cap).sum()))


class Labels:
    """Labels float64 [N, T], durations in capped seconds; whether each is known, bool [N, T]; weights float64 [N], 1 without a column.

    Raises:
        InputError: nulls where a label is needed, values that the task's kind does not allow, negative weights.
    """

    def __init__(self, table: pa.Table, schema: Schema, where: str) -> None:
        num_tasks = len(schema.labels)
        self.labels_NT, self.known_NT = np.zeros((len(table), num_tasks)), np.ones((len(table), num_tasks), bool)
        self.null_NT = np.zeros((len(table), num_tasks), bool)
        """Where a label that would mean something is null, and its task masks nulls."""
        self.capped: dict[str, tuple[int, int]] = {}
        """By task: durations below 0, and above the cap."""
        for t in sorted(range(num_tasks), key=lambda t: len(schema.ancestors(schema.labels[t]))):
            label = schema.labels[t]
            for parent in schema.ancestors(label):
                self.known_NT[:, t] &= self.labels_NT[:, parent] == 1
            values = plain_column(table, label.label)
            if label.nulls == "mask":
                self.null_NT[:, t] = self.known_NT[:, t] & values.is_null().to_numpy(zero_copy_only=False)
                self.known_NT[:, t] &= ~self.null_NT[:, t]
            self.labels_NT[:, t], capped = _label(values, label, self.known_NT[:, t], where)
            if any(capped):
                self.capped[label.name] = capped
        self.weight_N = _weights(table, schema.data.weight, where)


def _weights(table: pa.Table, column: str | None, where: str) -> np.ndarray:
    if column is None:
        return np.ones(len(table))
    values = plain_column(table, column)
    if values.null_count:
        raise InputError(f"{where}: column '{column}' (data.weight) has {values.null_count} nulls")
    weights = _finite(_floats(values), column, "data.weight", where)
    if (weights < 0).any():
        raise InputError(f"{where}: column '{column}' (data.weight) holds the negative weight {weights.min():g}")
    return weights


def label_columns(schema: Schema) -> list[str]:
    return [label.label for label in schema.labels] + ([schema.data.weight] if schema.data.weight else [])


class Decoder:
    """Decodes the slices of one split.

    Args:
        labels: whether the files have labels; without them labels are 0, known is false and weights are 1.
        skip_features: names of features that the files lack: no ids, dense 0.
    """

    def __init__(self, schema: Schema, fitted: Fitted, *, labels: bool = True, skip_features: Collection[str] = ()) -> None:
        self.schema, self.fitted, self.labels = schema, fitted, labels
        self.absent = frozenset(skip_features)
        names = [f.column for f in schema.features if f.name not in self.absent] + (label_columns(schema) if labels else [])
        self.columns = list(dict.fromkeys(names))

    def decode(self, table: pa.Table, where: str, first_row: int) -> tuple[Columns, dict[str, tuple[int, int]]]:
        """Check and convert rows.

        Args:
            first_row: their number in the split.
        Returns:
            The rows; and by task, durations below 0 and above the cap.
        Raises:
            InputError: names file, row group, column and what is wrong.
        """
        num_rows = len(table)
        row_N, capped = np.arange(first_row, first_row + num_rows), {}
        ids_F = [self._ids(table, feature, where) for feature in self.schema.id_features]
        rows = Columns(ids_F, self._dense_columns(table, where), *unlabelled(num_rows, self.schema), row_N)
        rows.weight_N[:] = 1.0
        if self.labels:
            labels = Labels(table, self.schema, where)
            rows.labels_NT[:], rows.known_NT[:], rows.weight_N[:] = labels.labels_NT, labels.known_NT, labels.weight_N
            capped = labels.capped
        return rows, capped

    def _dense_columns(self, table: pa.Table, where: str) -> np.ndarray:
        columns_D: list[np.ndarray] = []
        for feature in self.schema.dense_features:
            if feature.name in self.absent:
                columns_D += [np.zeros(len(table), np.float32)] * feature.width
            else:
                columns_D += list(self._dense(plain_column(table, feature.column), feature, where).T)
        dense_ND = np.empty((len(table), len(columns_D)), np.float32)
        for start in range(0, len(table), _BLOCK_ROWS):  # a block of all columns fits in the cache
            rows = slice(start, start + _BLOCK_ROWS)
            for d, column_N in enumerate(columns_D):
                dense_ND[rows, d] = column_N[rows]
        return dense_ND

    def _ids(self, table: pa.Table, feature: Feature, where: str) -> Jagged:
        if feature.name in self.absent:
            return Jagged.empty(len(table))
        values = plain_column(table, feature.column)
        if feature.kind == "ids" and pa.types.is_null(values.type):
            return Jagged.empty(len(values))
        rows = table_rows(raw_ids(values, feature, where), feature, self.schema.table(feature.table), self.fitted, where)
        if feature.kind == "id":
            return Jagged(rows)
        jagged = Jagged(rows, list_offsets(values))
        return jagged if feature.max_length is None else jagged.last(feature.max_length)

    def _dense(self, values: pa.Array, feature: Feature, where: str) -> np.ndarray:
        if feature.kind == "dense":
            values = _filled(values, feature, where)
        numbers = raw_numbers(values, feature, where)
        asked_by = f"feature '{feature.name}'"
        if feature.transform != "none" or feature.scale != 1.0:
            _finite(numbers, feature.column, asked_by, where)
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                numbers = self.fitted.transformed(numbers.astype(np.float64), feature) * feature.scale
        return _finite(numbers, feature.column, asked_by, where)
