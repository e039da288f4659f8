"""What a split's files hold, by their footers: columns that fit and agree, and the slices of their rows."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from ..row_groups import DataFile, Slice
from ..schema import InputError, Schema
from ..storage.access import is_url
from .chunks import chunks, leaves
from .files import describe, first_line, may_skip
from .layout import ColumnTypes, check_columns

logger = logging.getLogger(__name__)

_COPIES = 5
"""How often a slice is in memory at most: held, decoded ahead, read from its file, and parts of it on the way."""


@dataclass
class Listing:
    """The slices of a split, in file order, and the files that were left out, with the reasons."""

    slices: list[Slice] = field(default_factory=list)
    types: ColumnTypes = field(default_factory=ColumnTypes)
    bad_files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Path to rows, 0 where nobody knows, and reason."""

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


@dataclass
class _Header:
    """What the footer of a file that fits the recipe tells."""

    file: DataFile
    families: dict[str, str]
    row_groups: list[tuple[int, int]]
    """Rows, and bytes in memory."""

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)


def _read_header(schema: Schema, path: str, labels: bool, skip_features: Collection[str]) -> _Header | InputError:
    """The header, or why there is none; what may not be skipped is raised at once."""
    try:
        file, metadata = describe(path, _name_below(schema.data.root, path))
        families = check_columns(schema, path, metadata.schema.to_arrow_schema(), labels=labels, skip_features=skip_features)
        sizes = _row_group_bytes(path, metadata, families)
    except InputError as error:
        if not may_skip(schema, error):
            raise
        return error
    return _Header(file, families, [(metadata.row_group(number).num_rows, size) for number, size in enumerate(sizes)])


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
    files = [_read_header(schema, path, labels, skip_features) for path in paths]
    if schema.data.on_bad_file == "skip":
        # Else the first file would decide what the others may hold, however small it is.
        listing.types.prefer([(header.file.path, header.rows, header.families) for header in files if isinstance(header, _Header)])
    groups: list[tuple[DataFile, int, int, int]] = []
    for path, header in zip(paths, files, strict=True):
        try:
            if isinstance(header, InputError):
                raise header
            listing.types.add(path, header.families)
        except InputError as error:
            if not may_skip(schema, error) or len(listing.bad_files) + 1 == len(paths):
                raise
            logger.warning("skipped a file: %s", error)
            listing.bad_files[path] = (header.rows if isinstance(header, _Header) else 0, str(error))
            continue
        groups += [(header.file, number, rows, size) for number, (rows, size) in enumerate(header.row_groups)]
    listing.slices = list(_slices(groups, schema))
    if listing.num_rows == 0:
        raise InputError(f"{', '.join(paths)}: no rows")
    return listing
