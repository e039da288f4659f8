"""Listing, opening and reading parquet files; every failure names the file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from ..row_groups import DataFile, Slice
from ..schema import InputError, Schema
from ..storage.access import StorageError, is_url, open_input, with_retries
from .chunks import chunks, leaves
from .layout import ColumnTypes, check_columns
from .pages import check_lists, check_pages

logger = logging.getLogger(__name__)

_TAIL_BYTES = 1 << 16
_STREAM_BUFFER_BYTES = 1 << 18
_SKIP_ROWS = 1 << 16
_COPIES = 5
"""How often a slice is in memory at most: held, decoded ahead, read from its file, and parts of it on the way."""


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def open_file(path: str) -> pq.ParquetFile:
    """An open parquet file whose page checksums are verified.

    Raises:
        InputError: the file is no whole parquet file.
    """
    try:
        return with_retries(path, lambda: pq.ParquetFile(open_input(path), page_checksum_verification=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def _read_footer(path: str) -> tuple[int, bytes]:
    """The size of the file, and its footer with length and magic bytes."""
    with open_input(path) as source:
        size = source.size()
        source.seek(max(0, size - _TAIL_BYTES))
        tail = source.read()
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or length > size:
            raise pa.ArrowInvalid("no parquet magic bytes at its end; a file of another kind, or cut off" if size else "the file is empty")
        if length > len(tail):
            source.seek(size - length)
            tail = source.read(length)
        return size, tail[-length:]


def _describe(path: str, name: str) -> tuple[DataFile, pq.FileMetaData]:
    try:
        size, footer = with_retries(path, lambda: _read_footer(path))
        metadata = pq.read_metadata(pa.BufferReader(footer))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error
    digest = hashlib.sha256(footer).hexdigest()[:16]
    rows = sum(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if rows != metadata.num_rows:
        raise InputError(f"{path}: a damaged parquet file: {metadata.num_rows} rows, but {rows} in its row groups")
    return DataFile(path, name, size, digest), metadata


@lru_cache(maxsize=64)
def _metadata(file: DataFile) -> pq.FileMetaData:
    found, metadata = _describe(file.path, file.name)
    if found != file:
        raise InputError(f"{file.path}: the file changed since it was listed")
    return metadata


@dataclass
class Listing:
    """The slices of a split, in file order, and the files that were left out, with the reasons."""

    slices: list[Slice] = field(default_factory=list)
    types: ColumnTypes = field(default_factory=ColumnTypes)
    bad_files: dict[str, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(part.rows for part in self.slices)


def _row_group_bytes(path: str, metadata: pq.FileMetaData, columns: Collection[str]) -> list[int]:
    """About what each row group takes in memory when it is decoded: 8 bytes a value and a list.

    Raises:
        InputError: the footer is damaged.
    """

    def size(row_group: int, numbers: Collection[int]) -> int:
        total, rows = 0, metadata.row_group(row_group).num_rows
        for chunk in chunks(metadata, row_group, numbers):
            lists = rows if "." in chunk.path_in_schema else 0
            total += max(8 * (chunk.num_values + lists), chunk.total_uncompressed_size)
        return total

    try:
        numbers = leaves(metadata, columns)
        return [size(row_group, numbers) for row_group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: a damaged parquet file ({first_line(error)})") from error


def _slices(groups: Sequence[tuple[DataFile, int, int, int]], schema: Schema) -> Iterator[Slice]:
    """Cut (file, row group, rows, bytes) so that what is open at the same time fits in memory."""
    lanes = min(schema.data.shuffle_row_groups if schema.data.shuffle else 1, max(len(groups), 1))
    budget = max(1, (schema.data.memory_mb << 20) // (lanes * _COPIES))
    first_row = 0
    for file, number, rows, size in groups:
        step = max(1, -(-rows // max(1, -(-size // budget))))
        for start in range(0, rows, step):
            yield Slice(file, number, start, first_row + start, min(step, rows - start))
        first_row += rows


def _name_below(root: str, path: str) -> str:
    """The path without the root and without a URL's options, which may be others tomorrow."""
    root, path = (name.partition("?")[0] if is_url(name) else name for name in (root, path))
    return path.removeprefix(root.rstrip("/") + "/")


def may_skip(schema: Schema, error: InputError) -> bool:
    """Whether what caused the error is to be left out and counted. Storage that is away for a while is not."""
    return schema.data.on_bad_file == "skip" and not isinstance(error, StorageError)


def list_slices(
    schema: Schema, paths: Sequence[str], *, labels: bool, skip_features: Collection[str] = (), types: ColumnTypes | None = None
) -> Listing:
    """Check the files' columns and list their rows.

    Args:
        labels: whether the files must hold labels.
        skip_features: names of features that the files may lack.
        types: what the columns hold in other files of the run; the files are added.
    Raises:
        InputError: a file that is unreadable or does not fit (with `on_bad_file = "skip"`: all of them), or no rows at all.
    """
    listing = Listing(types=types or ColumnTypes())
    groups: list[tuple[DataFile, int, int, int]] = []
    for path in paths:
        try:
            file, metadata = _describe(path, _name_below(schema.data.root, path))
            found = check_columns(schema, path, metadata.schema.to_arrow_schema(), labels=labels, skip_features=skip_features)
            sizes = _row_group_bytes(path, metadata, found)
            listing.types.add(path, found)
        except InputError as error:
            if not may_skip(schema, error) or len(listing.bad_files) + 1 == len(paths):
                raise
            logger.warning("skipped a file: %s", error)
            listing.bad_files[path] = str(error)
            continue
        groups += [(file, number, metadata.row_group(number).num_rows, size) for number, size in enumerate(sizes)]
    listing.slices = list(_slices(groups, schema))
    if listing.num_rows == 0:
        raise InputError(f"{', '.join(paths)}: no rows")
    return listing


def _without_views(table: pa.Table) -> pa.Table:
    """String views as strings: Arrow neither takes, sorts nor fills views."""

    def plain(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_list(kind):
            return pa.list_(plain(kind.value_type))
        return pa.large_string() if pa.types.is_string_view(kind) else kind

    kinds = [plain(kind) for kind in table.schema.types]
    if kinds == table.schema.types:
        return table
    return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))


class _RowStream:
    """Rows of one row group, from its beginning on."""

    def __init__(self, file: pq.ParquetFile, row_group: int, columns: list[str], batch_rows: int) -> None:
        self.batches = file.iter_batches(batch_rows, row_groups=[row_group], columns=columns, use_threads=False)
        self.left: pa.RecordBatch | None = None
        self.row = 0

    def take(self, num_rows: int) -> list[pa.RecordBatch]:
        """The next rows, fewer at the end."""
        taken: list[pa.RecordBatch] = []
        while num_rows > 0:
            batch = self.left if self.left is not None else next(self.batches, None)
            if batch is None:
                break
            taken.append(batch.slice(0, num_rows))
            self.left = batch.slice(num_rows) if len(batch) > num_rows else None
            num_rows -= len(taken[-1])
            self.row += len(taken[-1])
        return taken

    def skip(self, num_rows: int) -> None:
        """Pass over rows, a batch at a time."""
        goal = self.row + num_rows
        while self.row < goal and self.take(min(goal - self.row, _SKIP_ROWS)):
            pass


class SliceReader:
    """Reads slices in any order; consecutive slices of a row group are decoded once. Not for several threads at once."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self._stream: tuple[DataFile, int, _RowStream] | None = None

    def read(self, part: Slice) -> pa.Table:
        """The columns of one slice.

        Raises:
            InputError: it cannot be read.
            OSError: the storage cannot be reached.
        """
        try:
            table = with_retries(part.file.path, lambda: self._read(part))
        except (pa.ArrowException, OSError) as error:
            if is_url(part.file.path):
                with_retries(part.file.path, lambda: _read_footer(part.file.path))  # else it is not the file that is bad
            raise InputError(f"{part} cannot be read ({first_line(error)})") from error
        if len(table) != part.rows:
            raise InputError(f"{part} holds {len(table)} rows instead of {part.rows}: the file is damaged, or changed since it was listed")
        return _without_views(table)

    def _read(self, part: Slice) -> pa.Table:
        metadata = _metadata(part.file)
        if part.rows == metadata.row_group(part.row_group).num_rows:
            whole = self._open(part.file, whole=True).read_row_group(part.row_group, columns=self.columns, use_threads=False)
            check_lists(whole, metadata, part.row_group)
            return whole
        stream = self._stream_at(part)
        batches = stream.take(part.rows)
        if not batches:
            raise pa.ArrowInvalid(f"the row group ends before row {part.start}")
        table = pa.Table.from_batches(batches)
        self._stream = (part.file, part.row_group, stream)
        return table

    def _stream_at(self, part: Slice) -> _RowStream:
        open_one, self._stream = self._stream, None  # an error leaves no stream behind
        if open_one is not None and open_one[:2] == (part.file, part.row_group) and open_one[2].row <= part.start:
            stream = open_one[2]
        else:
            file = self._open(part.file, whole=False)
            with open_input(part.file.path) as source:
                check_pages(source, _metadata(part.file), part.row_group, self.columns)
            stream = _RowStream(file, part.row_group, self.columns, min(part.rows, _SKIP_ROWS))
        stream.skip(part.start - stream.row)
        return stream

    def _open(self, file: DataFile, *, whole: bool) -> pq.ParquetFile:
        source = open_input(file.path)
        if source.size() != file.size:
            raise InputError(f"{file.path}: the file changed since it was listed")
        # With a buffer, column chunks stream; without one they are read whole.
        return pq.ParquetFile(
            source, metadata=_metadata(file), page_checksum_verification=True, pre_buffer=whole and is_url(file.path),
            buffer_size=0 if whole else _STREAM_BUFFER_BYTES,
        )  # fmt: skip


def read_slices(schema: Schema, slices: Sequence[Slice], columns: Sequence[str]) -> Iterator[tuple[Slice, pa.Table]]:
    """Every slice with its rows, one after the other; with `on_bad_file = "skip"` without those that cannot be read.

    Raises:
        InputError, OSError: as SliceReader.read.
    """
    reader = SliceReader(columns)
    for part in slices:
        try:
            table = reader.read(part)
        except InputError as error:
            if not may_skip(schema, error):
                raise
            continue
        yield part, table
