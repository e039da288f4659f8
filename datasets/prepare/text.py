"""What the raw logs share: text read in blocks of whole lines, broken lines named, parquet files that appear when they are whole."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from ..schema import InputError, nearest

BLOCK_BYTES = 16 << 20
"""Read, parsed and held at a time; no line may be longer."""
ROW_GROUP_ROWS = 20_000

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


class Part(NamedTuple):
    """Rows of some consecutive lines."""

    table: pa.Table
    in_tail: bool
    """Whether the lines stand in the tail of the file that `read_parts` was asked to tell apart."""


@dataclass(frozen=True)
class Layout:
    """Columns of a text file.

    Attributes:
        names: all columns, in the file's order.
        types: those to read, and how.
        nullable: those that may be empty.
        quoted: whether double quotes hold values with commas.
    """

    names: tuple[str, ...]
    types: Mapping[str, pa.DataType]
    nullable: frozenset[str] = frozenset()
    quoted: bool = True


class Meter:
    """Adds up the bytes read of some files."""

    def __init__(self, paths: Sequence[Path], progress: Progress) -> None:
        self.done, self.total, self.progress = 0, sum(path.stat().st_size for path in paths), progress

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress(self.done, self.total)


def locate(folders: Sequence[Path], names: Sequence[str], layout: str) -> list[Path]:
    """The named files, each in the first of the folders that has it.

    Args:
        layout: the official layout in words, for the message.
    Raises:
        InputError: names what is missing.
    """
    if not folders[0].is_dir():
        raise InputError(f"no such folder: {folders[0]}; give the one with {layout}")
    found = [next((folder / name for folder in folders if (folder / name).is_file()), None) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise InputError(f"{folders[0]}: no {', '.join(missing)}; the official layout is {layout}")
    return [path for path in found if path is not None]


def read_header(path: Path, official: Sequence[str]) -> tuple[str, ...]:
    """Column names of a CSV file, which are the official ones in any order.

    Raises:
        InputError: names missing, surplus and repeated columns.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline(BLOCK_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    names = tuple(name.strip().strip('"') for name in line.decode("utf-8-sig", errors="replace").split(","))
    missing = [f"'{name}'{nearest(name, set(names) - set(official))}" for name in official if name not in names][:10]
    surplus = [f"'{name[:40]}'" for name in names if name not in official][:10]
    repeated = [f"'{name}'" for name in dict.fromkeys(names) if names.count(name) > 1 and name in official]
    problems = [f"{what} {', '.join(which)}" for what, which in (("no", missing), ("surplus", surplus), ("repeated", repeated)) if which]
    if problems:
        raise InputError(f"{path}: not the official columns: {'; '.join(problems)}")
    return names


def parse_csv(data: bytes, layout: Layout) -> pa.Table:
    """Lines without a header as columns.

    Raises:
        ValueError: says what is wrong with some line.
    """
    read = list(layout.types)
    if not data.strip():
        return pa.table({name: pa.array([], layout.types[name]) for name in read})
    try:
        table = csv.read_csv(
            io.BytesIO(data),
            read_options=csv.ReadOptions(column_names=list(layout.names), block_size=len(data) + 1),
            parse_options=csv.ParseOptions(quote_char='"' if layout.quoted else False),
            convert_options=csv.ConvertOptions(
                column_types=dict(layout.types), include_columns=read, null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(_reason(error, layout.names)) from error
    for name in read:
        if table[name].null_count and name not in layout.nullable:
            raise ValueError(f"column '{name}' is empty")
        if (
            pa.types.is_floating(layout.types[name])
            and not pc.all(pc.is_finite(table[name])).as_py()
            and len(table) > table[name].null_count
        ):
            raise ValueError(f"column '{name}' holds NaN or infinity")
    return table


def _reason(error: Exception, names: Sequence[str]) -> str:
    message = str(error).splitlines()[0].removeprefix("CSV parse error: ").removeprefix("Row #1: ")
    message = re.sub(r"In CSV column #(\d+): (Row #\d+: )?", lambda match: f"column '{names[int(match[1])]}': ", message)
    return message if len(message) <= 200 else f"{message[:200]}..."


def check_flags(table: pa.Table, names: Sequence[str]) -> None:
    """Raise ValueError for values other than 0 and 1."""
    for name in names:
        numbers = table[name].to_numpy()
        if not ((numbers == 0) | (numbers == 1)).all():
            raise ValueError(f"column '{name}' must be 0 or 1, but holds {numbers[(numbers != 0) & (numbers != 1)][0]}")


def read_parts(path: Path, parse: Callable[[bytes], pa.Table], meter: Meter, *, header: bool = False, tail: float = 0.0) -> Iterator[Part]:
    """Rows of a text file, block by block; memory holds one block. A name that ends in .gz is decompressed on the way.

    Args:
        parse: lines -> rows; raises ValueError for a broken line. It must take any number of lines, none too.
        header: whether to skip the first line.
        tail: share of the file's bytes, at its end, whose lines are marked `in_tail`. Not for .gz.
    Raises:
        InputError: names file and line.
    """
    tail_from = path.stat().st_size * (1.0 - tail) if tail else float("inf")
    line, place = 1, 0
    for block in _blocks(path, meter):
        for piece in _cut(block, tail_from - place):
            lines = piece.partition(b"\n")[2] if header and place == 0 else piece
            line += 1 if lines is not piece else 0
            try:
                table = parse(lines)
            except ValueError:
                raise _broken(path, line, lines, parse) from None
            yield Part(table, place >= tail_from)
            line += lines.count(b"\n")
            place += len(piece)


def _blocks(path: Path, meter: Meter) -> Iterator[bytes]:
    """Whole lines, about BLOCK_BYTES at a time; a last line without an end gets one."""
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as file:
            rest, place = b"", 0
            while data := file.read(BLOCK_BYTES):
                end = data.rfind(b"\n") + 1
                if end == 0 and len(rest) + len(data) > BLOCK_BYTES:
                    raise InputError(f"{path}: a line of more than {BLOCK_BYTES >> 20} MiB; not a text log?")
                if end:
                    yield rest + data[:end]
                rest = data[end:] if end else rest + data
                meter.add(raw.tell() - place)
                place = raw.tell()
            if rest:
                yield rest + b"\n"
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw


def _cut(block: bytes, at: float) -> list[bytes]:
    """The block in two, at the first line that begins at or after byte `at`; or in one piece."""
    if not 0 < at < len(block):
        return [block]
    end = block.find(b"\n", int(np.ceil(at)) - 1) + 1
    return [piece for piece in (block[:end], block[end:]) if piece]


def _broken(path: Path, first_line: int, lines: bytes, parse: Callable[[bytes], pa.Table]) -> InputError:
    """Names the first line that `parse` refuses, found by halving."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
    good, bad, reason = 0, len(ends), ""
    while bad - good > 1 or not reason:
        middle = (good + bad + 1) // 2 if bad - good > 1 else bad
        try:
            parse(lines[: ends[middle - 1]])
            good = middle
        except ValueError as error:
            bad, reason = middle, str(error)
    return InputError(f"{path}: line {first_line + bad - 1}: {reason}")


class Outputs:
    """Parquet files of one folder, in row groups of ROW_GROUP_ROWS. They get their names together, when the `with` ends well.

    Raises:
        InputError: at the end, where a file got no rows.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self.counts = dict.fromkeys(names, 0)
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.waiting: dict[str, list[pa.Table]] = {name: [] for name in names}

    def __enter__(self) -> Outputs:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, name: str, table: pa.Table) -> None:
        """Append rows; fewer than a row group wait in memory."""
        if not len(table):
            return
        self.counts[name] += len(table)
        self.waiting[name].append(table)
        num_waiting = sum(map(len, self.waiting[name]))
        if num_waiting >= ROW_GROUP_ROWS:
            rows = pa.concat_tables(self.waiting[name])
            full = num_waiting - num_waiting % ROW_GROUP_ROWS
            self._append(name, rows.slice(0, full))
            self.waiting[name] = [rows.slice(full)]

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def _append(self, name: str, table: pa.Table) -> None:
        if name not in self.writers:
            self.writers[name] = pq.ParquetWriter(self._part(name), table.schema, compression="zstd", write_page_checksum=True)
        self.writers[name].write_table(table, ROW_GROUP_ROWS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            # First: closing may fail on a full disk.
            for name in self.names:
                self._part(name).unlink(missing_ok=True)
            for writer in self.writers.values():
                writer.close()

    def _finish(self) -> None:
        for name, count in self.counts.items():
            if count == 0:
                raise InputError(f"{self.folder / name} would have no rows: the log is too short, or lacks the days that belong there")
            if any(map(len, self.waiting[name])):
                self._append(name, pa.concat_tables(self.waiting[name]))
            self.writers[name].close()
        for name in self.names:
            os.replace(self._part(name), self.folder / name)
