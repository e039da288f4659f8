"""Which row of which row group goes to which rank, in which order, and where reading stands.

The order of an epoch is a function of (seed, epoch, row groups, window) alone. Row groups are permuted and dealt to `window`
lanes; the order takes one row of each lane in turn. A global batch is a stretch of that order; sorted by lane it is cut
into equal parts, one a rank, so that a rank only opens the row groups of its own lanes:

    lane 0   rg 7 | rg 2 | ...     rank 0
    lane 1   rg 0 | rg 5 | ...     rank 0
    lane 2   rg 3 | rg 1 | ...     rank 1
    lane 3   rg 6 | rg 4 | ...     rank 1
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class RowGroup(NamedTuple):
    """One row group of one file."""

    path: str
    number: int
    """Its number in the file."""
    first_row: int
    """The number of its first row in the whole split, in file order."""
    rows: int


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


def fingerprint(row_groups: Sequence[RowGroup]) -> str:
    """Changes when a file is added, removed, renamed or cut differently; a reading position is only good for one."""
    text = "\n".join(f"{group.path.rsplit('/', 1)[-1]} {group.number} {group.rows}" for group in row_groups)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class EpochOrder:
    """The order of the rows of one epoch.

    Args:
        row_groups: all row groups of the split, in file order.
        shuffle: whether to permute row groups and the rows in each; without it they stay in file order.
        window: number of lanes; one lane without shuffle is the file order.
    """

    def __init__(self, row_groups: Sequence[RowGroup], *, seed: int, epoch: int, shuffle: bool, window: int) -> None:
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        groups = [group for group in row_groups if group.rows > 0]
        if shuffle:
            groups = [groups[i] for i in self._generator(0).permutation(len(groups))]
        num_lanes = max(1, min(window, len(groups)))
        self.lanes: list[list[RowGroup]] = [[] for _ in range(num_lanes)]
        lengths = np.zeros(num_lanes, np.int64)
        for group in groups:
            shortest = int(np.argmin(lengths))
            self.lanes[shortest].append(group)
            lengths[shortest] += group.rows
        self.lane_lengths = lengths
        self.num_rows = int(lengths.sum())

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *key])

    def rows_within(self, group: RowGroup) -> np.ndarray | None:
        """The order of the rows of one row group, or None for the file order."""
        return self._generator(1, group.first_row).permutation(group.rows) if self.shuffle else None

    def taken(self, num_rows: int) -> np.ndarray:
        """How many rows of each lane are among the first `num_rows` of the order; [lanes]."""
        low, high = 0, int(self.lane_lengths.max(initial=0))
        while low < high:
            rounds = (low + high + 1) // 2
            if np.minimum(self.lane_lengths, rounds).sum() <= num_rows:
                low = rounds
            else:
                high = rounds - 1
        counts = np.minimum(self.lane_lengths, low)
        still_open = np.flatnonzero(self.lane_lengths > low)
        counts[still_open[: num_rows - int(counts.sum())]] += 1
        return counts

    def share(self, start: int, stop: int, rank: int, world_size: int) -> list[LaneRange]:
        """The rows of one rank among rows [start, stop) of the order; parts of all ranks differ by at most one row."""
        stop = min(stop, self.num_rows)
        first, last = self.taken(start), self.taken(stop)
        before = np.concatenate([[0], np.cumsum(last - first)])
        low, high = ((stop - start) * r // world_size for r in (rank, rank + 1))
        ranges = []
        for lane in range(len(self.lanes)):
            begin, end = max(low, before[lane]) - before[lane], min(high, before[lane + 1]) - before[lane]
            if begin < end:
                ranges.append(LaneRange(lane, int(first[lane] + begin), int(first[lane] + end)))
        return ranges
