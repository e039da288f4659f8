"""Dynamic ids of another run's checkpoint -> a map of another number of rows: the most frequent ids keep a row.

Shapes: N ids of this rank's sets, S slots of this rank, R rows of a part of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ...embeddings.dynamic.slot_map import SlotMap
from ...embeddings.dynamic.slots import Slots
from ..distributed import Ranks
from .parts import Part
from .reader import Reader

BLOCK_BYTES = 32 << 20
"""Held at a time of what is not read to where it stays."""


class Saved(NamedTuple):
    """Ids of a checkpoint, ascending."""

    code_N: np.ndarray
    count_N: np.ndarray
    last_N: np.ndarray
    slot_N: np.ndarray
    """Where they are in the checkpoint."""


class Moved(NamedTuple):
    """Ids in their new slots."""

    source_S: torch.Tensor
    """int64: the row of the checkpoint whose vector each slot's id had; -1 for empty slots."""
    num_placed: int
    """On all ranks."""
    num_ids: int
    """In the checkpoint."""


def carry_ids(reader: Reader, table: str, slot_map: SlotMap, ranks: Ranks) -> Moved:
    """Fill this rank's part of an empty map, set by set: the ids that were seen most, then the lowest ones. Collective."""
    if slot_map.waiting is not None and f"ids/{table}/waiting_id" in reader.names():
        _place(slot_map.waiting, slot_map, _saved_ids(reader, f"ids/{table}/waiting_", slot_map))
    saved = _saved_ids(reader, f"ids/{table}/", slot_map)
    slot_N = _place(slot_map.slots, slot_map, saved)
    placed_N = slot_N >= 0
    source_S = np.full(slot_map.slots.id_SW.size, -1)
    source_S[slot_N[placed_N]] = 1 + saved.slot_N[placed_N]
    counts = ranks.all_gather((int(np.count_nonzero(placed_N)), len(slot_N)))
    num_placed, num_ids = (sum(column) for column in zip(*counts, strict=True))
    return Moved(torch.from_numpy(source_S), num_placed, num_ids)


def _place(slots: Slots, slot_map: SlotMap, saved: Saved) -> np.ndarray:
    """The slot that each id gets, int64 [N]; -1 for none."""
    set_N = slot_map.geometry.sets(saved.code_N) - slot_map.first_set
    slot_N = slots.place(saved.code_N, set_N, saved.count_N, 1)  # step 1, as no slot of an empty map was seen in it
    placed_N = slot_N >= 0
    slots.last_SW.reshape(-1)[slot_N[placed_N]] = saved.last_N[placed_N]
    return slot_N


def _saved_ids(reader: Reader, prefix: str, slot_map: SlotMap) -> Saved:
    """Those that belong to this rank's sets now, read block by block."""
    parts: list[Saved] = []
    total = reader.manifest["tensors"][f"{prefix}id"]["shape"][0]
    block = BLOCK_BYTES // 16  # id, count, last
    for first in range(0, total, block):
        id_B, count_B, last_B = (
            _run(reader, prefix + name, first, min(block, total - first), dtype)
            for name, dtype in (("id", torch.int64), ("count", torch.int32), ("last", torch.int32))
        )
        set_B = slot_map.geometry.sets(id_B)
        own = np.flatnonzero((count_B > 0) & (set_B >= slot_map.first_set) & (set_B < slot_map.last_set))
        parts.append(Saved(id_B[own], count_B[own].astype(np.int64), last_B[own], first + own))
    joined = Saved(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.argsort(joined.code_N)
    return Saved(*(array_N[order] for array_N in joined))


def _run(reader: Reader, name: str, first: int, length: int, dtype: torch.dtype) -> np.ndarray:
    part = Part((first,), torch.empty(length, dtype=dtype))
    reader.read_part(name, part)
    return part.tensor.numpy()


def parts_sources(slot_map: SlotMap, source_S: torch.Tensor, parts: Sequence[Part], ranks: Ranks) -> list[torch.Tensor]:
    """The row of the checkpoint for each row of the parts of the table that this rank holds, int64 [R]; -1 for none.

    Which rank holds a row's id and which holds its vector has nothing to do with each other: ranks tell each other. Collective.
    """
    found = [torch.full((len(part.tensor),), -1) for part in parts]
    for part, source_R in zip(parts, found, strict=True):
        if part.offsets[0] == 0:
            source_R[0] = 0  # all ids without a row
    geometry = slot_map.geometry
    for owner in range(ranks.world_size):
        first, last = (1 + geometry.first_set(rank, ranks.world_size) * geometry.ways for rank in (owner, owner + 1))
        source_O = source_S if owner == ranks.rank else torch.empty(last - first, dtype=torch.int64)
        if ranks.world_size > 1:
            dist.broadcast(source_O, owner)
        for part, source_R in zip(parts, found, strict=True):
            low, high = max(first, part.offsets[0]), min(last, part.ends[0])
            if low < high:
                source_R[low - part.offsets[0] : high - part.offsets[0]] = source_O[low - first : high - first]
    return found
