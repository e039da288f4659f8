"""Vectors and dense features -> one number a task, and user and item vectors for retrieval."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from ..datasets.batch import Batch
from ..datasets.schema import SIDES, Label, Schema, Section, nearest
from ..embeddings.lookup import ALONE, Lookup
from ..embeddings.sharding import of_table
from ..embeddings.tables import EmbeddingTable
from .axes import Axes, Axis, Block, numbered, units, width, within
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


def make_sharing(section: ModelSection, tasks: int, inputs: int) -> SharedBottom | MMoE | PLE:
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

    def axes(self, inputs: Axis) -> dict[str, Axes]:
        """What the places of each weight stand for, given what the inputs do."""
        found: dict[str, Axes] = {}
        for number, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                found |= within(f"layers.{number}", {"weight": (units(layer.out_features), inputs), "bias": (units(layer.out_features),)})
                inputs = units(layer.out_features)
        return found


def dense_columns(schema: Schema, side: str) -> list[int]:
    """Columns of the dense matrix that belong to a side."""
    sides = [f.side for f in schema.dense_features for _ in range(f.width)]
    return [column for column, its_side in enumerate(sides) if its_side == side]


def vector_axis(schema: Schema, tables: Sequence[EmbeddingTable], side: str) -> Axis:
    """What `Lookup` gives of a side."""
    dims = {table.name: table.dim for table in tables}
    return tuple(Block("feature", f.name, dims[str(f.table)]) for f in schema.features if f.is_id and f.side == side)


def dense_axis(schema: Schema, sides: Sequence[str] = SIDES) -> Axis:
    """The columns of the dense matrix that belong to sides."""
    return tuple(Block("feature", f.name, f.width) for f in schema.dense_features if f.side in sides)


def task_block(label: Label) -> Block:
    """A task of another kind is another task."""
    return Block("task", f"{label.name} ({label.kind})", 1)


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
        vectors = {side: vector_axis(schema, tables, side) for side in SIDES}
        num_tasks = len(schema.labels)
        self.tasks, self.inputs = tuple(map(task_block, schema.labels)), (*itertools.chain(*vectors.values()), *dense_axis(schema))
        self.side_inputs = {side: (*vectors[side], *dense_axis(schema, [side])) for side in SIDES}
        self.sides = [side for side in SIDES if vectors[side]]
        self.bf16 = precision == "bf16"
        self.sharing = make_sharing(section, num_tasks, width(self.inputs))
        self.representation_width = section.expert_layers[-1]
        self.task_towers = BatchedMLP(num_tasks, self.representation_width, section.tower_layers, section.dropout)
        self.task_outputs = BatchedLinear(num_tasks, (self.representation_width, *section.tower_layers)[-1], 1)
        self.encoders = nn.ModuleDict()
        if retrieval is not None:
            for side in ("user", "item"):
                self.encoders[side] = SideEncoder(schema, side, width(vectors[side]), retrieval.layers, retrieval.dim)
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

    def axes(self) -> dict[str, Axes]:
        """What the places of each weight stand for."""
        found = within("sharing", self.sharing.axes(self.tasks, self.inputs))
        found |= within("task_towers", self.task_towers.axes(self.tasks, units(self.representation_width)))
        found |= within("task_outputs", self.task_outputs.axes(self.tasks, units(self.task_outputs.weight_GIO.shape[1])))
        for side, encoder in self.encoders.items():
            assert isinstance(encoder, SideEncoder)
            found |= within(f"encoders.{side}", encoder.axes(self.side_inputs[side]))
        return found | ({"affinity_bias": ()} if self.encoders else {})


class Recommender(nn.Module):
    """Lookup, then tower. Only calls its submodules, because the training pipeline traces it with torch.fx."""

    def __init__(self, lookup: Lookup, tower: Tower) -> None:
        super().__init__()
        self.lookup = lookup
        self.tower = tower

    def forward(self, batch: Batch) -> Outputs:
        return self.tower(self.lookup(batch.ids), batch.dense_BD)

    def axes(self) -> dict[str, Axes]:
        """What the places of each weight stand for, tables left out."""
        found = within("tower", self.tower.axes())
        for name, weight in self.named_parameters():
            if name not in found and of_table(name) is None:
                is_of_places = name.endswith(".place_PD")
                first = [numbered("place", weight.shape[0])] if is_of_places else []
                found[name] = (*first, *map(units, weight.shape[len(first) :]))
        return found
