"""One parquet row group -> Columns: read, checked, vectorised. Every error names file, row group and column."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import Columns, Jagged, empty_columns
from .files import open_file, read_row_group
from .ids import bucketise, table_rows
from .row_groups import RowGroup
from .schema import Feature, InputError, Label, Schema, nearest

_LARGEST = float(np.finfo(np.float32).max)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _fits(feature: Feature, kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    if pa.types.is_null(kind):
        return feature.default is not None or feature.kind == "ids"
    if feature.kind in ("ids", "vector"):
        if not _is_list(kind):
            return False
        # Lists that are all empty have values of type null.
        is_id = is_text(kind.value_type) or pa.types.is_null(kind.value_type)
        return _is_number(kind.value_type) or (feature.kind == "ids" and is_id)
    return _is_number(kind) or (feature.kind == "id" and feature.buckets is None and is_text(kind))


_WANTED = {"id": "integers or strings", "ids": "lists of integers or strings", "dense": "numbers", "vector": "lists of numbers"}


def is_moment(kind: pa.DataType) -> bool:
    return pa.types.is_date(kind) or pa.types.is_timestamp(kind)


def _is_group(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind) or is_moment(kind)


def _is_scenario(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(_value_type(kind))


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_moment(kind)


def _check_label_columns(schema: Schema, path: str, columns: pa.Schema) -> None:
    data = schema.data
    wanted = [(label.label, f"task '{label.name}'", _is_number, "numbers") for label in schema.labels]
    wanted += [
        (column, key, fits, wants)
        for column, key, fits, wants in (
            (data.weight, "data.weight", _is_number, "numbers"),
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


def _one_column(path: str, columns: pa.Schema, column: str, asked_by: str) -> pa.Field:
    count = columns.names.count(column)
    if count == 0:
        raise InputError(f"{path}: no column '{column}' for {asked_by}{nearest(column, columns.names)}")
    if count > 1:
        raise InputError(f"{path}: {count} columns are named '{column}', which {asked_by} reads")
    return columns.field(column)


def check_columns(schema: Schema, path: str, *, labels: bool, skip_features: Collection[str] = ()) -> None:
    """Every column the recipe reads is there once with a type that fits.

    Raises:
        InputError: names the column, the file, what is there and the nearest name.
    """
    columns = open_file(path).schema_arrow
    for feature in schema.features:
        if feature.name in skip_features:
            continue
        kind = _one_column(path, columns, feature.column, f"feature '{feature.name}'").type
        if not _fits(feature, kind):
            wants = "numbers" if feature.buckets is not None else _WANTED[feature.kind]
            raise InputError(
                f"{path}: column '{feature.column}' is {kind}, but feature '{feature.name}' of kind '{feature.kind}' needs {wants}"
            )
    if labels:
        _check_label_columns(schema, path, columns)


def plain_column(table: pa.Table, column: str) -> pa.Array:
    """A column in one piece, without a dictionary."""
    values = table.column(column).combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
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
    """float64 [N], NaN for null."""
    # A safe cast refuses integers above 2^53.
    return pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _finite(numbers: np.ndarray, column: str, asked_by: str, where: str) -> np.ndarray:
    """The numbers, which a float32 holds too."""
    bad = np.flatnonzero(~(np.abs(numbers) <= _LARGEST).all(axis=tuple(range(1, numbers.ndim))))
    if len(bad):
        raise InputError(
            f"{where}: column '{column}' ({asked_by}) holds NaN, infinity or what becomes one in {len(bad)} rows, first row {bad[0]}"
        )
    return numbers


def _one_id(values: pa.Array, feature: Feature, schema: Schema, where: str) -> np.ndarray:
    values = _filled(values, feature, where)
    if feature.buckets is not None:
        values = bucketise(_finite(_floats(values), feature.column, f"feature '{feature.name}'", where), feature)
    return table_rows(values, feature, schema.table(feature.table), where)


def _flat(values: pa.Array, feature: Feature, where: str) -> pa.Array:
    flat = pc.list_flatten(values)
    if flat.null_count:
        raise InputError(f"{where}: lists in column '{feature.column}' (feature '{feature.name}') hold {flat.null_count} nulls")
    return flat


def _id_list(values: pa.Array, feature: Feature, schema: Schema, where: str) -> Jagged:
    if pa.types.is_null(values.type):
        return Jagged.empty(len(values))
    flat = _flat(values, feature, where)
    lengths = pc.list_value_length(values).fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
    jagged = Jagged.from_lengths(table_rows(flat, feature, schema.table(feature.table), where), lengths)
    return jagged if feature.max_length is None else jagged.last(feature.max_length)


def _dense(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    asked_by = f"feature '{feature.name}'"
    if feature.kind == "vector":
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        if not (lengths == feature.size).all():
            raise InputError(f"{where}: column '{feature.column}' ({asked_by}) must hold exactly {feature.size} numbers in every row")
        values = _flat(values, feature, where)
    numbers = _floats(_filled(values, feature, where))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if feature.transform == "log1p":
            numbers = np.log1p(numbers)
        numbers = numbers * feature.scale
    return _finite(numbers.reshape(-1, feature.width), feature.column, asked_by, where).astype(np.float32)


def _label(values: pa.Array, label: Label, known_N: np.ndarray, where: str) -> np.ndarray:
    """float64 [N]; 0 where unknown, where a null is allowed too."""
    asked_by = f"task '{label.name}'"
    numbers = _floats(values)
    missing = int((values.is_null().to_numpy(zero_copy_only=False) & known_N).sum())
    if missing:
        raise InputError(f"{where}: label '{label.label}' of {asked_by} has {missing} nulls; drop those rows")
    numbers = _finite(np.where(known_N, numbers, 0.0), label.label, asked_by, where)
    if label.kind == "binary" and not ((numbers == 0) | (numbers == 1)).all():
        wrong = numbers[(numbers != 0) & (numbers != 1)][0]
        raise InputError(f"{where}: label '{label.label}' of {asked_by} must be 0 or 1, but holds {wrong:g}")
    if label.kind == "duration":
        if (numbers < 0).any():
            raise InputError(f"{where}: label '{label.label}' of {asked_by} holds the negative duration {numbers.min():g}")
        numbers = _finite(np.minimum(numbers * label.scale, label.cap or np.inf), label.label, asked_by, where)
    return numbers


def labels_of(table: pa.Table, schema: Schema, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels float64 [N, T], durations in capped seconds, and whether each is known, bool [N, T]."""
    num_tasks = len(schema.labels)
    labels_NT, known_NT = np.zeros((len(table), num_tasks)), np.ones((len(table), num_tasks), bool)
    for t in sorted(range(num_tasks), key=lambda t: len(schema.ancestors(schema.labels[t]))):
        for parent in schema.ancestors(schema.labels[t]):
            known_NT[:, t] &= labels_NT[:, parent] == 1
        labels_NT[:, t] = _label(plain_column(table, schema.labels[t].label), schema.labels[t], known_NT[:, t], where)
    return labels_NT, known_NT


def weights_of(table: pa.Table, schema: Schema, where: str) -> np.ndarray:
    """Row weights float64 [N]; ones without a weight column."""
    column = schema.data.weight
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


def decode(group: RowGroup, schema: Schema, *, labels: bool, skip_features: Collection[str] = ()) -> Columns:
    """Read and check one row group.

    Args:
        labels: whether the file has labels; without them labels are 0, known is false and weights are 1.
        skip_features: names of features that the file lacks: no ids, dense 0.
    Raises:
        InputError: names file, row group, column and what is wrong.
    """
    present = [f for f in schema.features if f.name not in skip_features]
    names = dict.fromkeys([f.column for f in present] + (label_columns(schema) if labels else []))
    table, where = read_row_group(group, list(names))
    rows = empty_columns(group.rows, schema)
    rows.row_N[:] = np.arange(group.first_row, group.first_row + group.rows)
    rows.weight_N[:] = 1.0
    if labels:
        rows.labels_NT[:], rows.known_NT[:] = labels_of(table, schema, where)
        rows.weight_N[:] = weights_of(table, schema, where)
    dense_column = 0
    for feature in schema.dense_features:
        if feature in present:
            rows.dense_ND[:, dense_column : dense_column + feature.width] = _dense(plain_column(table, feature.column), feature, where)
        dense_column += feature.width
    for i, feature in enumerate(schema.one_id_features):
        if feature in present:
            rows.ids_FN[i] = _one_id(plain_column(table, feature.column), feature, schema, where)
    for i, feature in enumerate(schema.list_features):
        if feature in present:
            rows.lists[i] = _id_list(plain_column(table, feature.column), feature, schema, where)
    return rows
