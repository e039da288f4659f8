"""Slots in sets: who sits where, who was seen how often, and who has to go for a new id.

Shapes: S sets, W ways, N ids, C candidates for a slot, G sets that have candidates, B sets of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np

from ...datasets.ids import mix
from ...datasets.schema import Eviction

SET_ROWS = 64
_BLOCK = 512
"""Sets worked on at a time: 256 KiB of ids, which stay in the cache."""
_NEVER = np.iinfo(np.int64).max
_MAX_COUNT = np.iinfo(np.int32).max


def _lfu(count: np.ndarray, last: np.ndarray, step: int) -> np.ndarray:
    return count.astype(np.int64) << 32 | last


def _lru(count: np.ndarray, last: np.ndarray, step: int) -> np.ndarray:
    return last.astype(np.int64) << 32 | count


def _distance_lfu(count: np.ndarray, last: np.ndarray, step: int) -> np.ndarray:
    # Positive floats are ordered like their bits.
    return (count / (step + 1 - last.astype(np.int64))).view(np.int64)


SCORES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {"lfu": _lfu, "lru": _lru, "distance_lfu": _distance_lfu}
"""(count, step last seen, step now) of slots -> int64, at least 0; the slot with the lowest score is the first to lose its id.

lfu: the rarest, then the oldest. lru: the oldest, then the rarest. distance_lfu: the lowest count / (1 + steps since it was last seen), as
TorchRec's DistanceLFU_EvictionPolicy with an exponent of 1.
"""
assert set(SCORES) == set(get_args(Eviction))


@dataclass(frozen=True)
class Geometry:
    """The sets of a table: `num_sets` times `ways` slots. Up to 63 rows at the end of a table are left over, and stay unused."""

    num_sets: int
    ways: int

    @classmethod
    def of(cls, rows: int) -> Geometry:
        """Raises ValueError if there is no row beside the shared one."""
        if rows < 2:
            raise ValueError(f'ids = "dynamic" needs at least 2 rows, one of them for all ids without a row of their own; got {rows}')
        num_sets = max(1, (rows - 1) // SET_ROWS)
        return cls(num_sets, (rows - 1) // num_sets)

    def first_set(self, rank: int, world_size: int) -> int:
        """Where a rank's range of sets begins, and that of the rank before it ends."""
        return self.num_sets * rank // world_size

    def sets(self, code_N: np.ndarray) -> np.ndarray:
        """The set each id belongs to, int64 [N]: mix(code) modulo the number of sets."""
        mixed_N, num_sets = mix(code_N), np.uint64(self.num_sets)
        return (mixed_N - mixed_N // num_sets * num_sets).view(np.int64)  # numpy vectorises the division, not the remainder


class Slots:
    """A range of sets. 16 bytes a slot.

    Args:
        num_sets, ways: of this range. Sets are counted from 0 here.
        eviction: which slot of a full set loses its id to a new one.
    """

    def __init__(self, num_sets: int, ways: int, eviction: Eviction) -> None:
        self.id_SW = np.zeros((num_sets, ways), np.int64)
        self.count_SW = np.zeros((num_sets, ways), np.int32)
        """Occurrences of the id; 0: the slot is empty."""
        self.last_SW = np.zeros((num_sets, ways), np.int32)
        """The step in which the id was last seen."""
        self.ways, self.score, self.num_taken = ways, SCORES[eviction], 0

    def find(self, code_N: np.ndarray, set_N: np.ndarray) -> np.ndarray:
        """The slot that holds each id, set * ways + way, int64 [N]; -1 for none."""
        slot_N, count = np.full(len(code_N), -1), self.count_SW.reshape(-1)
        id_BW = np.empty((_BLOCK, self.ways), np.int64)
        for start in range(0, len(code_N), _BLOCK):
            set_B = set_N[start : start + _BLOCK]
            block_BW = np.take(self.id_SW, set_B, axis=0, out=id_BW[: len(set_B)], mode="clip")
            found = np.flatnonzero(block_BW == code_N[start : start + _BLOCK, None])
            index = found // self.ways
            slot = set_B[index] * self.ways + (found - index * self.ways)
            taken = count[slot] > 0  # an empty slot holds id 0
            slot_N[start + index[taken]] = slot[taken]
        return slot_N

    def count(self, slot_N: np.ndarray, count_N: np.ndarray, step: int) -> np.ndarray:
        """Add occurrences to the ids of different slots, and return their counts, int64 [N]."""
        sum_N = np.minimum(self.count_SW.reshape(-1)[slot_N] + count_N, _MAX_COUNT)
        self._write(slot_N, sum_N, step)
        return sum_N

    def place(self, code_C: np.ndarray, set_C: np.ndarray, count_C: np.ndarray, step: int) -> np.ndarray:
        """Give slots to new ids. The slot each gets, int64 [C]; -1 for none.

        The ids of a set are served by their count, the higher first, then by id, the lower first. Each takes the first empty slot, or
        else the slot with the lowest score. A slot whose id was seen in this very step is never taken.

        Args:
            code_C: ascending, none of which has a slot.
        """
        # Stable, so that lower ids stay first.
        order = np.argsort((set_C << 32) - np.minimum(count_C, _MAX_COUNT), kind="stable")
        slot_C = np.full(len(code_C), -1)
        slot_C[order] = self._victims(set_C[order], step)
        gets = slot_C >= 0
        self.num_taken += int(np.count_nonzero(self.count_SW.reshape(-1)[slot_C[gets]] == 0))
        self.id_SW.reshape(-1)[slot_C[gets]] = code_C[gets]
        self._write(slot_C[gets], np.minimum(count_C[gets], _MAX_COUNT), step)
        return slot_C

    def free(self, slot_N: np.ndarray) -> None:
        """Empty different slots, all of which hold an id."""
        self.id_SW.reshape(-1)[slot_N] = 0
        self._write(slot_N, np.zeros(len(slot_N), np.int64), 0)
        self.num_taken -= len(slot_N)

    def loaded(self) -> None:
        """Recompute what follows from the arrays."""
        self.num_taken = int(np.count_nonzero(self.count_SW))

    def _write(self, slot_N: np.ndarray, count_N: np.ndarray, step: int) -> None:
        self.count_SW.reshape(-1)[slot_N] = count_N
        self.last_SW.reshape(-1)[slot_N] = step

    def _victims(self, set_C: np.ndarray, step: int) -> np.ndarray:
        """The slot that each candidate takes, int64 [C]; -1 for none. Candidates come in the order in which they are served, set by set."""
        slot_C = np.full(len(set_C), -1)
        start_G = np.flatnonzero(np.diff(set_C, prepend=-1))
        size_G = np.minimum(np.diff(start_G, append=len(set_C)), self.ways)
        for block in range(0, len(start_G), _BLOCK):
            start_B, size_B = start_G[block : block + _BLOCK], size_G[block : block + _BLOCK]
            set_B = set_C[start_B]
            count_BW, last_BW = self.count_SW[set_B], self.last_SW[set_B]
            score_BW = self.score(count_BW, last_BW, step)
            score_BW[count_BW == 0] = -1
            score_BW[last_BW == step] = _NEVER
            for place in range(int(size_B.max())):  # in all sets at once: the first candidates, then the second ones
                index = np.flatnonzero(size_B > place)
                way = score_BW[index].argmin(axis=1)
                free = score_BW[index, way] != _NEVER
                index, way = index[free], way[free]
                slot_C[start_B[index] + place] = set_B[index] * self.ways + way
                score_BW[index, way] = _NEVER
        return slot_C
