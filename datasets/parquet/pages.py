"""Whether the pages of a row group hold as many values as the footer says. Page checksums do not cover page headers.

Arrow believes a header's count of values, and passes over a page whose type it does not know. Lists then lose values; and where rows
are taken a few at a time, a column runs ahead of the others, which Arrow notices at the end of the row group.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .chunks import leaves
from .layout import is_list, list_offsets

_READ_BYTES = 1 << 10
_DEEPEST = 3
# Field numbers of parquet.thrift. A data page header of either version has its count in field 1.
_TYPE, _COMPRESSED_BYTES, _COUNT = 1, 3, 1
_DATA_PAGE_HEADER = {0: 5, 3: 8}
"""Page type to the field that holds the data page header."""


def check_lists(table: pa.Table, metadata: pq.FileMetaData, row_group: int) -> None:
    """The lists of a whole row group hold as many values as the footer says.

    Raises:
        ArrowInvalid: they do not.
    """
    for column in table.column_names:
        if is_list(table.schema.field(column).type):
            # An empty list counts as one value, and so does a null.
            count = 0
            for chunk in table.column(column).chunks:
                offsets = list_offsets(chunk)
                count += int(offsets[-1]) + int(np.count_nonzero(offsets[1:] == offsets[:-1]))
            for number in leaves(metadata, [column]):
                if metadata.schema.column(number).max_repetition_level:
                    _compare(metadata.row_group(row_group).column(number), count)


def check_pages(source: pa.NativeFile, metadata: pq.FileMetaData, row_group: int, columns: Collection[str]) -> None:
    """The page headers of these columns count as many values as the footer says. Reads the headers alone.

    Raises:
        ArrowInvalid: they do not, or are no headers.
    """
    for number in leaves(metadata, columns):
        chunk = metadata.row_group(row_group).column(number)
        _compare(chunk, _count(source, chunk))


def _compare(chunk: pq.ColumnChunkMetaData, count: int) -> None:
    if count != chunk.num_values:
        raise pa.ArrowInvalid(f"column '{chunk.path_in_schema}' holds {count} values instead of {chunk.num_values}")


def _count(source: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> int:
    position = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    end = position + chunk.total_compressed_size
    count = 0
    while count < chunk.num_values and position < end:
        try:
            header, header_bytes = page_header(source, position, end)
            position += header_bytes + abs(header[_COMPRESSED_BYTES])
            if header[_TYPE] in _DATA_PAGE_HEADER:
                count += header[_DATA_PAGE_HEADER[header[_TYPE]]][_COUNT]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise pa.ArrowInvalid(f"column '{chunk.path_in_schema}' has a damaged page header") from error
    return count


def page_header(source: pa.NativeFile, position: int, end: int) -> tuple[dict[int, Any], int]:
    """The fields of the header there by number, and its bytes.

    Raises:
        IndexError, ValueError: it is none.
    """
    length = _READ_BYTES
    while True:
        source.seek(position)
        try:
            return _struct(source.read(min(length, end - position)), 0, _DEEPEST)
        except IndexError:
            if position + length >= end:
                raise
        length *= 4  # long strings in the statistics


def _struct(data: bytes, at: int, deepest: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol: its numbers and structs by field number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        step, kind = divmod(data[at], 16)
        at += 1
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        if kind in (4, 5, 6):
            fields[number], at = _integer(data, at)
        elif kind == 8:  # bytes, after their length, which is not zigzag
            length, at = _varint(data, at)
            at += length
        elif kind == 12 and deepest:
            fields[number], at = _struct(data, at, deepest - 1)
        elif kind == 3:
            at += 1
        elif kind not in (1, 2):  # a boolean is its kind
            raise ValueError(f"kind {kind}")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
