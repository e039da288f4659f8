"""Recipe tables -> an EmbeddingBagCollection on meta, and initial weights that no sharding plan changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, field_validator
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from ..datasets.schema import Schema, TableIds

INIT_BLOCK_ROWS = 1 << 16
PREFIX = "table_"
"""Before a table's name in the model, where a module may not be called `items` or `keys`."""


class EmbeddingTable(TableIds):
    """`[[tables]]`: one embedding table. Features may share it."""

    name: str = Field(pattern=r"^[^./@]+$")
    """Without dots, slashes or @."""
    dim: int = Field(gt=0)
    """Width of a vector; a multiple of 4."""
    init: PositiveFloat = 0.01
    """Standard deviation of the initial weights."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"

    @field_validator("dim")
    @classmethod
    def _multiple_of_four(cls, dim: int) -> int:
        if dim % 4:
            raise ValueError("must be a multiple of 4")
        return dim


def table_configs(tables: Sequence[EmbeddingTable], schema: Schema) -> list[EmbeddingBagConfig]:
    """One TorchRec config a table. All pool by sum; `Lookup` makes means of them, see there."""
    return [
        EmbeddingBagConfig(
            name=PREFIX + table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=[f.name for f in schema.features if f.table == table.name],
            pooling=PoolingType.SUM,
            init_fn=torch.nn.init.zeros_,
        )
        for table in tables
    ]


def meta_collection(tables: Sequence[EmbeddingTable], schema: Schema) -> EmbeddingBagCollection:
    """The tables without memory; sharding gives each rank its part."""
    return EmbeddingBagCollection(tables=table_configs(tables, schema), device=torch.device("meta"))


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
