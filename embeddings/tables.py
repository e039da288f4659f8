"""Recipe tables -> TorchRec collections on meta, and initial weights that no sharding plan changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..datasets.schema import Schema, TableIds

Sharding = Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
Placement = Literal["device", "uvm", "uvm_caching"]
INIT_BLOCK_ROWS = 1 << 16
PREFIX = "table_"
"""Before a table's name in the model, where a module may not be called `items` or `keys`."""


class EmbeddingTable(TableIds):
    """`[[tables]]`: one embedding table. Features may share it."""

    name: str = Field(pattern=r"^[^./@]+$")
    """Without dots, slashes or @."""
    rows: int = Field(gt=0, le=2**40)
    dim: int = Field(gt=0)
    """Width of a vector; a multiple of 4."""
    init: PositiveFloat = 0.01
    """Standard deviation of the initial weights."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Of the weights. Optimizer state, sums and gradients are fp32 in any case."""
    lr: PositiveFloat | None = None
    """Learning rate of this table; `train.embedding_lr`, unless given."""
    weight_decay: NonNegativeFloat | None = None
    """L2 on the rows that a step looks up; `train.embedding_weight_decay`, unless given."""
    sharding: Sharding = "auto"
    memory: Placement = "device"
    """CUDA: uvm keeps the table in host memory, uvm_caching the most used rows of it in GPU memory too. On CPU all are host memory."""
    cache: float = Field(default=0.2, gt=0.0, le=1.0)
    """uvm_caching: share of the rows that GPU memory holds."""

    @field_validator("dim")
    @classmethod
    def _multiple_of_four(cls, dim: int) -> int:
        if dim % 4:
            raise ValueError("must be a multiple of 4")
        return dim

    @model_validator(mode="after")
    def _memory_goes_with_sharding(self) -> EmbeddingTable:
        if self.sharding == "data_parallel" and self.memory != "device":
            raise ValueError(f"table '{self.name}': memory = \"{self.memory}\" goes with tables that are sharded, not with data_parallel")
        if self.memory != "uvm_caching" and self.cache != type(self).model_fields["cache"].default:
            raise ValueError(f"table '{self.name}': cache goes with memory = \"uvm_caching\"")
        if self.ids == "dynamic" and self.memory == "uvm_caching":
            raise ValueError(f'table \'{self.name}\': rows of dynamic ids begin anew outside of a cache; use memory = "uvm" or "device"')
        return self


class Collections(NamedTuple):
    """The tables as TorchRec modules."""

    bags: EmbeddingBagCollection | None
    """Pooled by sum."""
    sequences: nn.ModuleList
    """One vector an id, for what attends to single ids. One collection a width, as each has one."""


def is_sequence_table(table: str, schema: Schema) -> bool:
    """Whether the table's features need single vectors. A table is one module's, so then all of its features get them."""
    return any(f.table == table and f.pooling == "attention" for f in schema.features)


def _config(table: EmbeddingTable, schema: Schema) -> dict[str, Any]:
    return {
        "name": PREFIX + table.name,
        "num_embeddings": table.rows,
        "embedding_dim": table.dim,
        "feature_names": [f.name for f in schema.features if f.table == table.name],
        "data_type": DataType.FP16 if table.dtype == "fp16" else DataType.FP32,
        "init_fn": torch.nn.init.zeros_,
    }


def meta_collections(tables: Sequence[EmbeddingTable], schema: Schema) -> Collections:
    """The tables without memory; sharding gives each rank its part. Bags pool by sum; `Lookup` makes means of them, see there."""
    meta = torch.device("meta")
    bags = [
        EmbeddingBagConfig(**_config(table, schema), pooling=PoolingType.SUM)
        for table in tables
        if not is_sequence_table(table.name, schema)
    ]
    sequences: dict[int, list[EmbeddingConfig]] = {}
    for table in tables:
        if is_sequence_table(table.name, schema):
            sequences.setdefault(table.dim, []).append(EmbeddingConfig(**_config(table, schema)))
    return Collections(
        EmbeddingBagCollection(tables=bags, device=meta) if bags else None,
        nn.ModuleList(EmbeddingCollection(tables=sequences[dim], device=meta) for dim in sorted(sequences)),
    )


def initial_rows(table: EmbeddingTable, seed: int, block: int) -> torch.Tensor:
    """Initial weights of rows [block * INIT_BLOCK_ROWS, ...) of a table: a function of seed, table name and block alone."""
    rows = min(INIT_BLOCK_ROWS, table.rows - block * INIT_BLOCK_ROWS)
    key = hashlib.sha256(f"{seed} {block} {table.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
    return torch.empty(rows, table.dim).normal_(0.0, table.init, generator=generator)


@torch.no_grad()
def fill_table(weight: torch.Tensor | ShardedTensor, table: EmbeddingTable, seed: int) -> None:
    """Write the initial weights into a table, or into this rank's shards of it, block by block."""
    if isinstance(weight, ShardedTensor):
        parts = [(shard.tensor, shard.metadata.shard_offsets) for shard in weight.local_shards()]
    else:
        parts = [(weight, [0, 0])]
    for part, (first_row, first_column) in parts:
        last_row, last_column = first_row + part.shape[0], first_column + part.shape[1]
        for block in range(first_row // INIT_BLOCK_ROWS, -(-last_row // INIT_BLOCK_ROWS)):
            start = block * INIT_BLOCK_ROWS
            rows = initial_rows(table, seed, block)
            low, high = max(first_row, start), min(last_row, start + len(rows))
            part[low - first_row : high - first_row].copy_(rows[low - start : high - start, first_column:last_column])
