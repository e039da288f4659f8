"""Batch: what one rank trains in one step, as the TorchRec pipeline moves it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B rows. A padded row has no ids, zero labels, weight 0 and row number -1.

    Shapes: B rows, D dense columns, T tasks.
    """

    ids: KeyedJaggedTensor
    """Rows of tables, keyed by feature name, feature-major. Of dynamic tables, ids, until they are mapped to rows."""
    dense_BD: torch.Tensor
    labels_BT: torch.Tensor
    """float32; durations in seconds, capped. 0 where unknown."""
    known_BT: torch.Tensor
    """bool; whether the label means something: every task it is `given` has label 1."""
    weight_B: torch.Tensor
    row_B: torch.Tensor
    """int64; the row's number in its split, in file order."""
    fresh_A3: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))
    """int64; number of a dynamic table, row, id: rows that begin anew with this batch, of all ranks."""

    def _map(self, move) -> Batch:
        return Batch(**{part.name: move(getattr(self, part.name)) for part in fields(self)})

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in fields(self):
            getattr(self, part.name).record_stream(stream)
