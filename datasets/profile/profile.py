"""One pass over parquet files -> what is in each column, and a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from ..parquet.chunks import chunks
from ..parquet.files import first_line, open_file
from ..schema import InputError, nearest
from .columns import ColumnProfile, ColumnTally, common_kind, kind_of
from .sample import RowSample

SAMPLE_ROWS = 200_000
_BATCH_ROWS = 65_536
_BATCH_VALUES = 8_000_000
"""Values of a batch, elements of lists among them: rows are fewer where they are wide."""


@dataclass
class Profile:
    """What is in the files."""

    files: int
    row_groups: int
    bytes: int
    """Compressed size of the columns."""
    rows: int
    columns: dict[str, ColumnProfile]
    sample: pa.Table
    """Rows in random order; texts and lists as int64 codes."""

    def as_json(self) -> dict[str, object]:
        facts: dict[str, object] = {"rows": self.rows, "files": self.files, "row_groups": self.row_groups, "bytes": self.bytes}
        return facts | {"sampled_rows": len(self.sample), "columns": {name: column.as_json() for name, column in self.columns.items()}}


def profile_files(paths: list[str], *, sample_rows: int = SAMPLE_ROWS, progress: Callable[[int, int], None] | None = None) -> Profile:
    """Profile parquet files as one table.

    Args:
        sample_rows: rows of the sample at most.
        progress: called with the rows read so far, and all.
    Raises:
        InputError: a file cannot be read, has no rows, or has other columns than the first.
    """
    headers = [_header(path) for path in paths]
    total = sum(header.rows for header in headers)
    if total == 0:
        raise InputError(f"{paths[0]}{' and the other files' if len(paths) > 1 else ''}: no rows")
    kinds = _kinds(headers)
    types = {field.name: str(field.type) for field in headers[0].schema}
    tallies = {name: ColumnTally(name, kind, element, types[name]) for name, (kind, element) in kinds.items()}
    sample, done = RowSample(kinds, sample_rows), 0
    for header in headers:
        for batch in _batches(header):
            sample.add(done, {name: tally.add(batch.column(name)) for name, tally in tallies.items()})
            done += len(batch)
            if progress is not None:
                progress(done, total)
    columns = {name: tally.finish() for name, tally in tallies.items()}
    groups, size = sum(header.row_groups for header in headers), sum(header.bytes for header in headers)
    return Profile(len(paths), groups, size, total, columns, sample.rows())


class _Header(NamedTuple):
    """What a file's footer says."""

    path: str
    schema: pa.Schema
    rows: int
    row_groups: int
    bytes: int
    values: int
    """Leaf values of all columns; more than rows times columns where there are lists."""


def _header(path: str) -> _Header:
    file = open_file(path)
    metadata = file.metadata
    size, values, leaves = 0, 0, range(metadata.num_columns)
    try:
        for row_group in range(metadata.num_row_groups):
            for chunk in chunks(metadata, row_group, leaves):
                size, values = size + chunk.total_compressed_size, values + chunk.num_values
        return _Header(path, file.schema_arrow, metadata.num_rows, metadata.num_row_groups, size, values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: a damaged parquet file ({first_line(error)})") from error


def _kinds(headers: list[_Header]) -> dict[str, tuple[str, str]]:
    """Each column's kind and its elements' kind, over all files."""
    first, kinds = headers[0], {}
    for header in headers:
        _check_names(header.path, header.schema, first.path, first.schema)
    for name in first.schema.names:
        types = {header.path: header.schema.field(name).type for header in headers}
        kind = common_kind({kind_of(type_) for type_ in types.values()})
        element = kind
        if kind == "list":
            element = common_kind({kind_of(type_.value_type) for type_ in types.values() if kind_of(type_) == "list"})
        if kind is None or element is None:
            path = next(p for p, type_ in types.items() if type_ != types[first.path])
            raise InputError(
                f"{path}: column '{name}' is {types[path]}, but {types[first.path]} in {first.path}; write it the same in all files"
            )
        kinds[name] = (kind, element)
    return kinds


def _check_names(path: str, schema: pa.Schema, first_path: str, first: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise InputError(f"{path}: {schema.names.count(name)} columns are named '{name}'; rename them")
        if name not in first.names:
            raise InputError(f"{path}: column '{name}' is not in {first_path}{nearest(name, first.names)}; give files of one table")
    for name in first.names:
        if name not in schema.names:
            raise InputError(f"{path}: no column '{name}', which is in {first_path}; give files of one table")


def _batches(header: _Header) -> Iterator[pa.RecordBatch]:
    values_a_row = max(1.0, header.values / max(1, header.rows))
    size = int(max(1, min(_BATCH_ROWS, _BATCH_VALUES / values_a_row)))
    try:
        yield from open_file(header.path).iter_batches(batch_size=size, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{header.path}: cannot be read ({first_line(error)})") from error
