"""Opening and reading parquet files; every failure names the file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from ..row_groups import DataFile, Slice
from ..schema import InputError, Schema
from ..storage.access import StorageError, is_url, open_input, with_retries
from .pages import check_lists, check_pages

logger = logging.getLogger(__name__)

_TAIL_BYTES = 1 << 16
_STREAM_BUFFER_BYTES = 1 << 18
_SKIP_ROWS = 1 << 16


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


def describe(path: str, name: str) -> tuple[DataFile, pq.FileMetaData]:
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
    found, metadata = describe(file.path, file.name)
    if found != file:
        raise InputError(f"{file.path}: the file changed since it was listed")
    return metadata


def may_skip(schema: Schema, error: InputError) -> bool:
    """Whether what caused the error is to be left out and counted. Storage that is away for a while is not."""
    return schema.data.on_bad_file == "skip" and not isinstance(error, StorageError)


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


def read_slices(
    schema: Schema, slices: Sequence[Slice], columns: Sequence[str], check: Callable[[Slice, pa.Table], object] | None = None
) -> Iterator[tuple[Slice, pa.Table]]:
    """Every slice with its rows, one after the other; with `on_bad_file = "skip"` without those that are bad.

    Args:
        check: raises InputError for rows that are bad although they can be read.
    Raises:
        InputError, OSError: as SliceReader.read; and what `check` raises.
    """
    reader = SliceReader(columns)
    for part in slices:
        try:
            table = reader.read(part)
            if check is not None:
                check(part, table)
        except InputError as error:
            if not may_skip(schema, error):
                raise
            logger.warning("skipped %d rows: %s", part.rows, error)
            continue
        yield part, table
