"""Named tensors, whole or sharded, as the rectangles that a rank holds of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ...embeddings.dynamic.slot_map import RowShard

Value = torch.Tensor | ShardedTensor | RowShard
"""Whole on every rank, or in parts: rectangles of a table, or a run of its rows."""
State = Mapping[str, Value]


@dataclass(frozen=True)
class Part:
    """One rectangle of a named tensor: where it begins in the whole, and its values."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.tensor.shape, strict=True))

    def cut(self, most_bytes: int) -> Iterator[Part]:
        """The same values in runs of rows of at most `most_bytes`, or of one row."""
        if self.tensor.nbytes <= most_bytes or self.tensor.dim() == 0:
            yield self
            return
        row = self.offsets[0]
        for tensor in self.tensor.split(max(1, most_bytes * len(self.tensor) // self.tensor.nbytes)):
            yield Part((row, *self.offsets[1:]), tensor)
            row += len(tensor)


def local_parts(value: Value) -> list[Part]:
    """The parts of a tensor that this rank holds."""
    if isinstance(value, ShardedTensor):
        return [Part(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
    if isinstance(value, RowShard):
        return [Part((value.first,) + (0,) * (value.tensor.dim() - 1), value.tensor)]
    return [Part((0,) * value.dim(), value)]


def is_sharded(value: Value) -> bool:
    return isinstance(value, ShardedTensor | RowShard)


def shape_of(value: Value) -> list[int]:
    """Of the whole tensor."""
    return [value.total, *value.tensor.shape[1:]] if isinstance(value, RowShard) else list(value.size())


def dtype_of(value: Value) -> str:
    return str(value.tensor.dtype if isinstance(value, RowShard) else value.dtype).removeprefix("torch.")
