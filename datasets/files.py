"""Finding, opening and reading parquet files; every failure names the file."""

from __future__ import annotations

import threading
from functools import lru_cache
from glob import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .row_groups import RowGroup
from .schema import InputError, nearest


def is_there(pattern: str) -> bool:
    """Whether a file or folder has this name, or a glob matches any."""
    return Path(pattern).exists() or bool(glob(pattern, recursive=True))


def _parquet_files(path: Path) -> list[Path]:
    return [p for p in path.glob("**/*.parquet") if p.is_file()] if path.is_dir() else [path]


def find_files(root: str | Path, pattern: str) -> list[str]:
    """Parquet files of a file name, folder or glob, sorted; relative to `root`, unless absolute.

    Raises:
        InputError: nothing there.
    """
    path = Path(root) / pattern
    matches = [path] if path.exists() else [Path(root) / match for match in glob(pattern, root_dir=root, recursive=True)]
    # A glob with ** matches both a folder and the files in it.
    found = sorted({file for match in matches for file in _parquet_files(match)})
    if found:
        return [str(file) for file in found]
    if matches:
        raise InputError(f"{path}: a folder without parquet files")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise InputError(f"no such file: {path}{nearest(path.name, siblings)}")


def open_file(path: str) -> pq.ParquetFile:
    """An open file, kept open, one a thread: rows are read group by group.

    Raises:
        InputError: the file is no whole parquet file.
    """
    return _open_in_thread(path, threading.get_ident())


@lru_cache(maxsize=64)
def _open_in_thread(path: str, thread: int) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def list_row_groups(paths: list[str]) -> list[RowGroup]:
    """All row groups of the files, in order.

    Raises:
        InputError: a file is unreadable, or there are no rows at all.
    """
    groups: list[RowGroup] = []
    first_row = 0
    for path in paths:
        metadata, rows_before = open_file(path).metadata, first_row
        for index in range(metadata.num_row_groups):
            rows = metadata.row_group(index).num_rows
            groups.append(RowGroup(path, index, first_row, rows))
            first_row += rows
        if first_row - rows_before != metadata.num_rows:
            raise InputError(f"{path}: a damaged parquet file: {metadata.num_rows} rows, but {first_row - rows_before} in its row groups")
    if first_row == 0:
        raise InputError(f"{', '.join(paths)}: no rows")
    return groups


def read_row_group(group: RowGroup, columns: list[str]) -> tuple[pa.Table, str]:
    """The columns of one row group, and what to call it in messages."""
    where = f"{group.path}: row group {group.number}"
    try:
        table = open_file(group.path).read_row_group(group.number, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} cannot be read ({_first_line(error)})") from error
    if len(table) != group.rows:
        raise InputError(f"{where} holds {len(table)} rows instead of {group.rows}: the file is damaged, or changed since it was opened")
    return table, where
