"""Which row of which row group goes to which rank, in which order, and where reading stands.

The order of an epoch is a function of (seed, epoch, files, window) alone. Row groups are permuted and dealt to `window`
lanes; the order takes one row of each lane in turn. A global batch is a stretch of that order; sorted by lane it is cut
into equal parts, one a rank, so that a rank only opens the row groups of its own lanes:

    lane 0   rg 7 | rg 2 | ...     rank 0
    lane 1   rg 0 | rg 5 | ...     rank 0
    lane 2   rg 3 | rg 1 | ...     rank 1
    lane 3   rg 6 | rg 4 | ...     rank 1
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np


class DataFile(NamedTuple):
    """One parquet file of a split."""

    path: str
    """Full path, or URL."""
    name: str
    """Below the split's root: the same wherever the root is."""
    size: int
    """Bytes."""
    digest: str
    """Of the footer, which holds where every column chunk lies and its statistics."""


class Slice(NamedTuple):
    """Consecutive rows of one row group: all of them, unless they would not fit in memory."""

    file: DataFile
    row_group: int
    """Its number in the file."""
    start: int
    """The number of its first row in the row group."""
    first_row: int
    """The number of its first row in the whole split, in file order."""
    rows: int

    def __str__(self) -> str:
        return f"{self.file.path}: row group {self.row_group}" + (f" from row {self.start}" if self.start else "")


def place_of_row(slices: Sequence[Slice], row: int) -> str:
    """The file, row group and row in it of a row of the split, all counted from 0; `slices` are those of the whole split, in file order."""
    part = slices[bisect_right(slices, row, key=lambda part: part.first_row) - 1]
    assert part.first_row <= row < part.first_row + part.rows, f"no slice holds row {row}"
    return f"{part.file.path}: row group {part.row_group}, row {part.start + row - part.first_row}"


class LaneRange(NamedTuple):
    """Rows [start, stop) of one lane."""

    lane: int
    start: int
    stop: int


@dataclass(frozen=True)
class ReadingPosition:
    """Where training stands: rows [0, row) of the order of `epoch` are trained, over all ranks."""

    epoch: int = 0
    row: int = 0


def fingerprint(slices: Sequence[Slice]) -> str:
    """Changes when a file is added, removed, renamed, or differs in size or footer; a reading position is only good for one.

    The footer holds the sizes, places and extremes of all column chunks. Values that change none of these go unnoticed.
    """
    files = dict.fromkeys(part.file for part in slices)
    text = "\n".join(f"{file.name} {file.size} {file.digest}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cuts(slices: Sequence[Slice]) -> str:
    """Changes when row groups are cut into other slices: another `memory_mb`, or other columns to read."""
    text = " ".join(str(part.rows) for part in slices)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class EpochOrder:
    """The order of the rows of one epoch.

    Args:
        slices: all slices of the split, in file order.
        shuffle: whether to permute row groups and the rows in each slice; without it they stay in file order.
        window: number of lanes; one lane without shuffle is the file order.
    """

    def __init__(self, slices: Sequence[Slice], *, seed: int, epoch: int, shuffle: bool, window: int) -> None:
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        whole = (part for part in slices if part.rows > 0)
        # Slices of one row group stay together and in order: parquet is decoded from a row group's beginning on.
        groups = [list(parts) for _, parts in groupby(whole, key=lambda part: (part.file.path, part.row_group))]
        if shuffle:
            groups = [groups[i] for i in self._generator(0).permutation(len(groups))]
        num_lanes = max(1, min(window, len(groups)))
        self.lanes: list[list[Slice]] = [[] for _ in range(num_lanes)]
        lengths = np.zeros(num_lanes, np.int64)
        for group in groups:
            shortest = int(np.argmin(lengths))
            self.lanes[shortest] += group
            lengths[shortest] += sum(part.rows for part in group)
        self.lane_lengths = lengths
        self.num_rows = int(lengths.sum())
        self._ascending = np.sort(lengths)
        lanes_left = num_lanes - np.arange(num_lanes)
        self._rows_at_end = np.cumsum(np.diff(self._ascending, prepend=0) * lanes_left)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *key])

    def rows_within(self, part: Slice) -> np.ndarray | None:
        """The order of the rows of one slice, or None for the file order."""
        return self._generator(1, part.first_row).permutation(part.rows) if self.shuffle else None

    def taken(self, num_rows: int) -> np.ndarray:
        """How many rows of each lane are among the first `num_rows` of the order; [lanes]."""
        # Before the k-th shortest lane ends, its length rounds have each taken a row of every lane that is not shorter.
        k = int(np.searchsorted(self._rows_at_end, num_rows, side="right"))
        if k == len(self.lanes):
            return self.lane_lengths.copy()
        rows_before, rounds_before = (int(self._rows_at_end[k - 1]), int(self._ascending[k - 1])) if k else (0, 0)
        rounds, rest = divmod(num_rows - rows_before, len(self.lanes) - k)
        counts = np.minimum(self.lane_lengths, rounds_before + rounds)
        still_open = np.flatnonzero(self.lane_lengths > rounds_before + rounds)
        counts[still_open[:rest]] += 1
        return counts

    def share(self, start: int, stop: int, rank: int, world_size: int) -> list[LaneRange]:
        """The rows of one rank among rows [start, stop) of the order; parts of all ranks differ by at most one row."""
        stop = min(stop, self.num_rows)
        low, high = ((stop - start) * r // world_size for r in (rank, rank + 1))
        ranges, before = [], 0
        for lane, (first, last) in enumerate(zip(self.taken(start).tolist(), self.taken(stop).tolist(), strict=True)):
            after = before + last - first
            begin, end = max(low, before), min(high, after)
            if begin < end:
                ranges.append(LaneRange(lane, first + begin - before, first + end - before))
            before = after
        return ranges
