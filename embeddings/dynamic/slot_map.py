"""Which id has which row of a table: ids never seen before get rows, rare or old ones lose them.

A table of R rows. Row 0 is shared by all ids that have no row of their own. The others are slots, in sets of 64 or a few more; an id may
only have a slot of the set that its hash names, so a set is a small table by itself, and a rank can hold any range of sets:

    row     0        1 .. 64    65 .. 128   129 .. 192    ...
            shared   set 0      set 1       set 2
                     `----- rank 0 -----´   `-- rank 1 -- ...

Two ids never share a row, except row 0. Which id has which row is a function of the table and of the ids of each global step alone.

Shapes: U different ids of a step, N of them without a row, C of them candidates for one, A admitted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ...datasets.schema import Eviction
from .slots import Geometry, Slots


class RowShard(NamedTuple):
    """A rank's part of an array that is cut along its first dimension, sharing the array's memory."""

    tensor: torch.Tensor
    first: int
    """Where the part begins in the whole array."""
    total: int
    """Length of the whole array."""


class Counters(NamedTuple):
    """What happened in one step. The first three count occurrences, the others ids."""

    occurrences: int
    hits: int
    """Of ids that had a row before the step."""
    shared: int
    """Of ids that have none after it."""
    admitted: int
    evicted: int
    refused: int
    """Seen often enough, but every slot of their set holds an id of this very step."""
    taken: int
    """Rows that belong to an id after the step."""


class Observed(NamedTuple):
    """Rows after a step."""

    row_U: np.ndarray
    """int64; 0 for ids without a row."""
    admitted_row_A: np.ndarray
    """int64, ascending."""
    admitted_code_A: np.ndarray
    """int64, the id of each of these rows."""
    counters: Counters


class SlotMap:
    """The rows of sets [first_set, last_set) of one table. 16 bytes a row, and 16 more if `min_count` is above 1.

    With `min_count` above 1, each set has as many places to wait in as it has rows. An id without a row waits there while its occurrences
    are counted. Places are few, so an id may be forgotten between two occurrences (the rarest one first), and its count starts again.
    No id gets a row before its `min_count`-th occurrence.

    Args:
        rows: of the whole table.
        eviction: which row of a full set loses its id to a new one.
        min_count: occurrences, from the first to the last one remembered, that an id needs for a row.
        rank, world_size: which of the equal ranges of sets is held.
    Raises:
        ValueError: fewer than 2 rows.
    """

    def __init__(self, rows: int, eviction: Eviction = "lfu", min_count: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.geometry, self.min_count = Geometry.of(rows), min_count
        self.first_set, self.last_set = (self.geometry.first_set(r, world_size) for r in (rank, rank + 1))
        shape = self.last_set - self.first_set, self.geometry.ways
        self.slots = Slots(*shape, eviction)
        self.waiting = Slots(*shape, "lfu") if min_count > 1 else None

    def find(self, code_U: np.ndarray) -> np.ndarray:
        """Rows of ids, int64 [U]; 0 for ids that have none. Changes nothing. All ids belong to sets of this map."""
        return self._rows(self.slots.find(code_U, self._sets(code_U)))

    def observe(self, code_U: np.ndarray, count_U: np.ndarray, step: int) -> Observed:
        """Count one step's ids, and give rows to new ones; in which order, `Slots.place` says.

        Args:
            code_U: int64, different, ascending, of sets of this map.
            count_U: int64, occurrences in the whole step, above 0.
            step: from 1, higher than in the last call.
        """
        set_U, taken = self._sets(code_U), self.slots.num_taken
        slot_U = self.slots.find(code_U, set_U)
        known, new_N = slot_U >= 0, np.flatnonzero(slot_U < 0)
        self.slots.count(slot_U[known], count_U[known], step)
        slot_N, refused = self._admit(code_U[new_N], set_U[new_N], count_U[new_N], step)
        slot_U[new_N] = slot_N
        admitted_U = ~known & (slot_U >= 0)
        row_U, admitted = self._rows(slot_U), int(np.count_nonzero(admitted_U))
        by_row = np.argsort(row_U[admitted_U])
        counters = Counters(
            occurrences=int(count_U.sum()),
            hits=int(count_U[known].sum()),
            shared=int(count_U[slot_U < 0].sum()),
            admitted=admitted,
            evicted=admitted - (self.slots.num_taken - taken),
            refused=refused,
            taken=self.slots.num_taken,
        )
        return Observed(row_U, row_U[admitted_U][by_row], code_U[admitted_U][by_row], counters)

    def state(self) -> dict[str, RowShard]:
        """What the map remembers, by name. To load it, write into these tensors, whatever range of sets wrote them, then call `loaded`."""
        first, total = self.first_set * self.geometry.ways, self.geometry.num_sets * self.geometry.ways
        parts = {"": self.slots} if self.waiting is None else {"": self.slots, "waiting_": self.waiting}
        return {
            prefix + name: RowShard(torch.from_numpy(array_SW.reshape(-1)), first, total)
            for prefix, slots in parts.items()
            for name, array_SW in (("id", slots.id_SW), ("count", slots.count_SW), ("last", slots.last_SW))
        }

    def loaded(self) -> None:
        """Recompute what follows from the state."""
        self.slots.loaded()
        if self.waiting is not None:
            self.waiting.loaded()

    def _sets(self, code_U: np.ndarray) -> np.ndarray:
        """Counted from the first set of this map."""
        set_U = self.geometry.sets(code_U) - self.first_set
        assert not len(set_U) or (set_U.min() >= 0 and set_U.max() < self.last_set - self.first_set), "ids of another rank's sets"
        return set_U

    def _rows(self, slot_U: np.ndarray) -> np.ndarray:
        return np.where(slot_U < 0, 0, slot_U + (1 + self.first_set * self.geometry.ways))

    def _admit(self, code_N: np.ndarray, set_N: np.ndarray, count_N: np.ndarray, step: int) -> tuple[np.ndarray, int]:
        """The slots that ids without one get, int64 [N], -1 for none, and how many had occurrences enough but found no slot."""
        if self.waiting is None:
            slot_N = self.slots.place(code_N, set_N, count_N, step)
            return slot_N, int(np.count_nonzero(slot_N < 0))
        place_N, slot_N, sum_N = self.waiting.find(code_N, set_N), np.full(len(code_N), -1), count_N.copy()
        waits_N = place_N >= 0
        sum_N[waits_N] = self.waiting.count(place_N[waits_N], count_N[waits_N], step)
        enough_N = sum_N >= self.min_count
        slot_N[enough_N] = self.slots.place(code_N[enough_N], set_N[enough_N], sum_N[enough_N], step)
        self.waiting.free(place_N[waits_N & (slot_N >= 0)])
        comes_N = ~waits_N & (slot_N < 0)
        self.waiting.place(code_N[comes_N], set_N[comes_N], count_N[comes_N], step)
        return slot_N, int(np.count_nonzero(enough_N & (slot_N < 0)))
