"""Vectors and dense features -> one number a task, and user and item vectors for retrieval."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from ..datasets.batch import Batch
from ..datasets.schema import SIDES, Schema, Section, nearest
from ..embeddings.lookup import ALONE, Lookup
from ..embeddings.tables import EmbeddingTable
from .experts import BatchedLinear, BatchedMLP
from .sharing import PLE, MMoE, SharedBottom


class ModelSection(Section):
    """`[model]`: the tower."""

    sharing: Literal["shared_bottom", "mmoe", "cgc", "ple"] = "mmoe"
    experts: PositiveInt = 8
    """mmoe: number of experts. cgc and ple: number of shared experts a level."""
    task_experts: PositiveInt = 2
    """cgc and ple: experts of each task a level."""
    levels: PositiveInt = 2
    """ple: extraction levels."""
    expert_layers: tuple[PositiveInt, ...] = Field(default=(256, 128), min_length=1)
    tower_layers: tuple[PositiveInt, ...] = (64,)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    attention_layers: tuple[PositiveInt, ...] = Field(default=(36,), min_length=1)
    """Hidden layers of what weighs the ids of a list feature with pooling = "attention"."""


class RetrievalSection(Section):
    """`[retrieval]`: a user and an item vector whose inner product is trained on a binary task, for export and search."""

    user: str
    """The id feature that names a user."""
    item: str
    """The id feature that names an item."""
    dim: PositiveInt = 32
    layers: tuple[PositiveInt, ...] = (64,)
    task: str | None = None
    """The binary task whose label the inner product learns; the first one, unless given."""
    weight: NonNegativeFloat = 0.2
    """Factor of its loss."""

    def check(self, schema: Schema) -> int:
        """The position of its task.

        Raises:
            ValueError: a feature or task that is not there or does not fit.
        """
        by_name = {f.name: f for f in schema.features}
        for side, name in (("user", self.user), ("item", self.item)):
            if name not in by_name:
                raise ValueError(f"retrieval.{side} = '{name}' is no feature{nearest(name, by_name)}")
            if by_name[name].kind != "id" or by_name[name].side != side or by_name[name].buckets is not None:
                raise ValueError(f"retrieval.{side} = '{name}' must be a feature of kind 'id' and side '{side}'")
        if "retrieval" in [label.name for label in schema.labels]:
            raise ValueError("a task may not be named 'retrieval' where there is a [retrieval] section: its loss has that name")
        binary = [label.name for label in schema.labels if label.kind == "binary"]
        if not binary or (self.task is not None and self.task not in binary):
            raise ValueError(f"retrieval.task must be one of the binary tasks: {', '.join(binary) or 'there is none'}")
        return [label.name for label in schema.labels].index(self.task or binary[0])


def make_sharing(section: ModelSection, tasks: int, inputs: int) -> nn.Module:
    common: dict[str, Any] = {"layers": section.expert_layers, "dropout": section.dropout}
    if section.sharing == "shared_bottom":
        return SharedBottom(tasks, inputs, **common)
    if section.sharing == "mmoe":
        return MMoE(tasks, inputs, experts=section.experts, **common)
    levels = 1 if section.sharing == "cgc" else section.levels
    return PLE(tasks, inputs, experts=section.experts, task_experts=section.task_experts, levels=levels, **common)


class SideEncoder(nn.Module):
    """The features of one side -> a vector. Shapes: vectors [B, V], dense_BD -> [B, dim]."""

    dense_columns: torch.Tensor

    def __init__(self, schema: Schema, side: str, vector_width: int, layers: Sequence[int], dim: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("dense_columns", torch.tensor(dense_columns(schema, side), dtype=torch.long), persistent=False)
        widths = [vector_width + len(self.dense_columns), *layers]
        hidden = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], dim))

    def forward(self, vectors: dict[str, torch.Tensor], dense_BD: torch.Tensor) -> torch.Tensor:
        # A user's vector may not depend on the item that it will be multiplied with.
        own_BV = vectors[self.side + ALONE] if self.side + ALONE in vectors else vectors[self.side]
        return self.layers(torch.cat([own_BV, dense_BD[:, self.dense_columns]], dim=1))


def dense_columns(schema: Schema, side: str) -> list[int]:
    """Columns of the dense matrix that belong to a side."""
    sides = [f.side for f in schema.dense_features for _ in range(f.width)]
    return [column for column, its_side in enumerate(sides) if its_side == side]


class Outputs(NamedTuple):
    """logits_BT: one number a task. affinity_B: inner product of user and item vectors, plus a bias; None without retrieval."""

    logits_BT: torch.Tensor
    affinity_B: torch.Tensor | None


class Tower(nn.Module):
    """Everything without tables: sharing, task towers, retrieval encoders.

    Shapes: vectors {side: [B, V]}, dense_BD -> Outputs.
    """

    def __init__(
        self, section: ModelSection, retrieval: RetrievalSection | None, schema: Schema, tables: Sequence[EmbeddingTable], precision: str
    ) -> None:
        super().__init__()
        dims = {table.name: table.dim for table in tables}
        widths = {side: sum(dims[schema.table(f.table).name] for f in schema.features if f.is_id and f.side == side) for side in SIDES}
        num_tasks = len(schema.labels)
        self.sides = [side for side in SIDES if widths[side]]
        self.bf16 = precision == "bf16"
        self.sharing = make_sharing(section, num_tasks, sum(widths.values()) + schema.dense_width)
        self.task_towers = BatchedMLP(num_tasks, section.expert_layers[-1], section.tower_layers, section.dropout)
        self.task_outputs = BatchedLinear(num_tasks, (section.expert_layers[-1], *section.tower_layers)[-1], 1)
        self.encoders = nn.ModuleDict()
        if retrieval is not None:
            for side in ("user", "item"):
                self.encoders[side] = SideEncoder(schema, side, widths[side], retrieval.layers, retrieval.dim)
            self.affinity_bias = nn.Parameter(torch.zeros(()))

    def forward(self, vectors: dict[str, torch.Tensor], dense_BD: torch.Tensor) -> Outputs:
        with torch.autocast(dense_BD.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            x_BI = torch.cat([vectors[side] for side in self.sides] + [dense_BD], dim=1)
            logits_BT = self.task_outputs(self.task_towers(self.sharing(x_BI))).squeeze(2).t()
            affinity_B = None
            if self.encoders:
                user_BD, item_BD = (self.encoders[side](vectors, dense_BD) for side in ("user", "item"))
                affinity_B = ((user_BD * item_BD).sum(1) + self.affinity_bias).float()
        return Outputs(logits_BT.float(), affinity_B)


class Recommender(nn.Module):
    """Lookup, then tower. Only calls its submodules, because the training pipeline traces it with torch.fx."""

    def __init__(self, lookup: Lookup, tower: Tower) -> None:
        super().__init__()
        self.lookup = lookup
        self.tower = tower

    def forward(self, batch: Batch) -> Outputs:
        return self.tower(self.lookup(batch.ids), batch.dense_BD)
