"""Batches with the ids of dynamic tables -> the same batches with rows; counters of what happened on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ...datasets.batch import Batch
from ...datasets.schema import Schema
from ..tables import EmbeddingTable
from .exchange import DynamicIds
from .slot_map import Counters, RowShard


def dynamic_tables(tables: Sequence[EmbeddingTable]) -> list[EmbeddingTable]:
    return [table for table in tables if table.ids == "dynamic"]


class DynamicBatches:
    """Gives the ids of a model's dynamic tables rows, batch by batch. Collective: all ranks map as many batches, in the same order.

    The rows of a batch depend on the batches before it, and on nothing of training. So they may be found ahead of it, in a thread.

    Args:
        group: as of DynamicIds.
    """

    def __init__(
        self, tables: Sequence[EmbeddingTable], schema: Schema, rank: int, world_size: int, group: dist.ProcessGroup | None
    ) -> None:
        dynamic = dynamic_tables(tables)
        self.ids = DynamicIds(dynamic, rank, world_size, group)
        self.features = {table.name: [f.name for f in schema.features if f.table == table.name] for table in dynamic}
        self._ahead: deque[torch.Tensor] = deque()
        self.tally = DynamicTally({name: slots.geometry.num_sets * slots.geometry.ways for name, slots in self.ids.maps.items()})

    def learned(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches for training: new ids get rows, counts go up. What the batch must begin anew is in its `fresh_A3`."""
        for batch in batches:
            rows, fresh_A3, counters_TC = self.ids.learn(self._codes(batch.ids))
            self._ahead.append(counters_TC)
            yield replace(batch, ids=self._with_rows(batch.ids, rows), fresh_A3=fresh_A3)

    def found(self, batch: Batch) -> Batch:
        """A batch for evaluation: ids without a row have row 0, and nothing changes."""
        return replace(batch, ids=self._with_rows(batch.ids, self.ids.find(self._codes(batch.ids))))

    def after_step(self) -> None:
        """The oldest batch that was `learned` is trained now: its counters count."""
        self.tally.add(self._ahead.popleft())

    def state(self) -> Mapping[str, RowShard | torch.Tensor]:
        """What a checkpoint holds. Nothing may have been mapped ahead of training."""
        assert not self._ahead, f"{len(self._ahead)} batches were mapped and not trained"
        return self.ids.state()

    def _codes(self, ids: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        return {table: torch.cat([ids[name].values() for name in names]) for table, names in self.features.items()}

    def _with_rows(self, ids: KeyedJaggedTensor, rows: Mapping[str, torch.Tensor]) -> KeyedJaggedTensor:
        by_feature: dict[str, torch.Tensor] = {}
        for table, names in self.features.items():
            parts = rows[table].split([len(ids[name].values()) for name in names])
            by_feature |= dict(zip(names, parts, strict=True))
        values = torch.cat([by_feature.get(name, ids[name].values()) for name in ids.keys()])  # noqa: SIM118
        return KeyedJaggedTensor(ids.keys(), values, lengths=ids.lengths())


class DynamicTally:
    """Counters since the last report."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self.slots = slots
        self.total_TC = torch.zeros(len(slots), len(Counters._fields), dtype=torch.int64)

    def add(self, counters_TC: torch.Tensor) -> None:
        taken = Counters._fields.index("taken")
        self.total_TC += counters_TC
        self.total_TC[:, taken] = counters_TC[:, taken]  # a level, not a flow

    def report(self) -> dict[str, dict[str, float]]:
        """As `ids` in metrics.jsonl, since the last report, by table. hit_rate: share of ids (as often as they occur) that had a row before
        the step that met them. occupancy: share of the rows to be had that ids hold now."""
        found = {}
        for name, counts in zip(self.slots, self.total_TC.tolist(), strict=True):
            c = Counters(*counts)
            found[name] = {
                "hit_rate": c.hits / max(c.occurrences, 1),
                "occupancy": c.taken / self.slots[name],
                "admitted": c.admitted,
                "evicted": c.evicted,
                "refused": c.refused,
            }
        self.total_TC.zero_()
        return found
