"""The dynamic ids of all tables over all ranks: each id goes to the rank that holds its set, and its row comes back.

Shapes: T tables, W ranks, M ids of a batch, U different ones, N ids of all tables as they are sent, K ids as they arrive, A admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ...datasets.schema import Eviction
from .slot_map import Counters, Observed, RowShard, SlotMap

STEP = "step"
"""The name of the step counter in the state. Names of a table's arrays hold a slash."""


class DynamicTable(Protocol):
    """What is asked of a table; see `SlotMap`."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def min_count(self) -> int: ...
    @property
    def eviction(self) -> Eviction: ...


class Learned(NamedTuple):
    """Rows after a step. `fresh_A3` and `counters_TC` are the same on all ranks."""

    rows: dict[str, torch.Tensor]
    """int64 [M] of each table; 0 for ids without a row."""
    fresh_A3: torch.Tensor
    """int64, (number of the table, row, id) of all ids admitted in this step on any rank, by table, then row. What these rows held before
    belongs to another id, or to none."""
    counters_TC: torch.Tensor
    """int64, a row for each table, with the columns of `Counters`, over all ranks."""


class DynamicIds:
    """Gives ids rows. All ranks make the same calls in the same order; which rank saw which id of a step makes no difference.

    It keeps no state but its own, so it may run in a thread of its own if `group` is its own.

    Args:
        tables: with different names, the same on all ranks.
        group: ranks joined by gloo; needed if there is more than one rank.
    Raises:
        ValueError: a table of fewer than 2 rows.
    """

    def __init__(self, tables: Sequence[DynamicTable], rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        assert tables and (group is not None or world_size == 1)
        self.world_size, self.group = world_size, group
        self.maps = {table.name: SlotMap(table.rows, table.eviction, table.min_count, rank, world_size) for table in tables}
        self.step = torch.zeros(1, dtype=torch.int64)

    def learn(self, codes: Mapping[str, torch.Tensor]) -> Learned:
        """Count this step's ids, give rows to new ones, and return the rows of all.

        Args:
            codes: the ids of this rank's batch, int64 [M], on the CPU, for each table; none, or repeated ones, are fine.
        """
        self.step += 1
        observed: list[Observed] = []

        def observe(slot_map: SlotMap, code_U: np.ndarray, count_U: np.ndarray) -> np.ndarray:
            observed.append(slot_map.observe(code_U, count_U, int(self.step)))
            return observed[-1].row_U

        rows = self._route(codes, observe)
        counters_WTC = self._gather(torch.tensor([list(o.counters) for o in observed]).reshape(1, len(self.maps), len(Counters._fields)))
        return Learned(rows, self._fresh(observed, counters_WTC), counters_WTC.sum(dim=0))

    def find(self, codes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows of ids as they are, and 0 for ids without one. Changes nothing. Shapes as in `learn`."""
        return self._route(codes, lambda slot_map, code_U, _: slot_map.find(code_U))

    def state(self) -> dict[str, RowShard | torch.Tensor]:
        """This rank's part of what is remembered. To load it, write into these tensors, then call `loaded`.

        The step counter is whole on every rank. The other arrays are cut between ranks: any number of ranks can load what any other saved.
        """
        arrays = {f"{table}/{name}": shard for table, slot_map in self.maps.items() for name, shard in slot_map.state().items()}
        return {STEP: self.step, **arrays}

    def loaded(self) -> None:
        """Recompute what follows from the state."""
        for slot_map in self.maps.values():
            slot_map.loaded()

    def _route(
        self, codes: Mapping[str, torch.Tensor], work: Callable[[SlotMap, np.ndarray, np.ndarray], np.ndarray]
    ) -> dict[str, torch.Tensor]:
        """Send each table's different ids and their counts to the ranks of their sets, do the work there, and bring the rows back."""
        unique = [np.unique(codes[table].numpy(), return_inverse=True, return_counts=True) for table in self.maps]
        owner_N = np.concatenate([self._owners(m, code_U) for m, (code_U, _, _) in zip(self.maps.values(), unique, strict=True)])
        table_N = np.repeat(np.arange(len(unique)), [len(code_U) for code_U, _, _ in unique])
        send_N2 = np.stack([np.concatenate([u[0] for u in unique]), np.concatenate([u[2] for u in unique])], axis=1)

        order_N = np.argsort(owner_N, kind="stable")  # by rank, then table, then id
        sizes = np.bincount(owner_N.astype(np.int64) * len(unique) + table_N, minlength=self.world_size * len(unique))
        sent_WT = torch.from_numpy(sizes).reshape(self.world_size, len(unique))
        arriving_WT = self._swap(sent_WT, [1] * self.world_size, [1] * self.world_size)
        sent, arriving = sent_WT.sum(dim=1).tolist(), arriving_WT.sum(dim=1).tolist()
        arrived_K2 = self._swap(torch.from_numpy(send_N2[order_N]), sent, arriving).numpy()

        row_K = torch.from_numpy(self._work(arrived_K2, arriving_WT.numpy(), work))
        row_N = np.empty(len(order_N), np.int64)
        row_N[order_N] = self._swap(row_K, arriving, sent).numpy()
        table_rows = np.split(row_N, np.cumsum([len(code_U) for code_U, _, _ in unique])[:-1])
        return {
            table: torch.from_numpy(row_U[inverse_M]) for table, row_U, (_, inverse_M, _) in zip(self.maps, table_rows, unique, strict=True)
        }

    def _work(
        self, arrived_K2: np.ndarray, sizes_WT: np.ndarray, work: Callable[[SlotMap, np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Do each table's work once for all ranks; the row of each (id, count) that arrived, int64 [K]."""
        table_K = np.repeat(np.tile(np.arange(len(self.maps), dtype=np.int16), self.world_size), sizes_WT.reshape(-1))
        by_table = np.split(np.argsort(table_K, kind="stable"), np.cumsum(sizes_WT.sum(axis=0))[:-1])
        row_K = np.empty(len(arrived_K2), np.int64)
        for slot_map, part in zip(self.maps.values(), by_table, strict=True):
            code_U, inverse = np.unique(arrived_K2[part, 0], return_inverse=True)
            count_U = np.zeros(len(code_U), np.int64)
            np.add.at(count_U, inverse, arrived_K2[part, 1])
            row_K[part] = work(slot_map, code_U, count_U)[inverse]
        return row_K

    def _owners(self, slot_map: SlotMap, code_U: np.ndarray) -> np.ndarray:
        """The rank that holds each id's set, int16 [U]: a type that numpy sorts by counting."""
        ends = [slot_map.geometry.first_set(rank + 1, self.world_size) for rank in range(self.world_size)]
        return np.searchsorted(ends, slot_map.geometry.sets(code_U), side="right").astype(np.int16)

    def _fresh(self, observed: Sequence[Observed], counters_WTC: torch.Tensor) -> torch.Tensor:
        admitted_W = counters_WTC[:, :, Counters._fields.index("admitted")].sum(dim=1)
        padded_A3 = torch.zeros(int(admitted_W.max()), 3, dtype=torch.int64)
        if not len(padded_A3):
            return padded_A3
        own = [np.stack([np.full_like(o.admitted_row_A, t), o.admitted_row_A, o.admitted_code_A], axis=1) for t, o in enumerate(observed)]
        own_A3 = torch.from_numpy(np.concatenate(own))
        padded_A3[: len(own_A3)] = own_A3
        parts = [part_A3[:size] for part_A3, size in zip(self._gather(padded_A3[None]), admitted_W.tolist(), strict=True)]
        fresh_A3 = torch.cat(parts)  # rows ascend from rank to rank
        return fresh_A3[torch.argsort(fresh_A3[:, 0], stable=True)]

    def _swap(self, parts: torch.Tensor, sent: list[int], arriving: list[int]) -> torch.Tensor:
        """Send each rank its part, cut along the first dimension; what arrives, by rank."""
        if self.world_size == 1:
            return parts
        arrived = parts.new_empty(sum(arriving), *parts.shape[1:])
        dist.all_to_all_single(arrived, parts.contiguous(), arriving, sent, group=self.group)
        return arrived

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """[1, ...] of each rank -> [W, ...]."""
        if self.world_size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)
