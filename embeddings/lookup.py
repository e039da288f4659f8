"""Ids -> {side: vectors}. Vectors are regrouped by name: a KeyedTensor's own column order follows the sharding plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from ..datasets.schema import SIDES, Feature, Schema
from .gradients import GradientGuard
from .pooling import TargetAttention, pool_mean, pool_sum
from .tables import Collections, is_sequence_table

ALONE = "_alone"
"""Ends the name of what is pooled without looking at the other side, where attention looks there."""


class Regroup(nn.Module):
    """KeyedTensors -> {group: the vectors of its features, side by side}, by name.

    As TorchRec's KTRegroupAsDict, whose CPU kernel goes row by row and takes longer than all the rest of a step.
    """

    def __init__(self, groups: dict[str, list[str]]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, pooled: Sequence[KeyedTensor]) -> dict[str, torch.Tensor]:
        vectors: dict[str, torch.Tensor] = {}
        for keyed in pooled:
            vectors |= keyed.to_dict()
        return {group: torch.cat([vectors[name] for name in names], dim=1) for group, names in self.groups.items()}


class MeanPooling(nn.Module):
    """Divides the pooled sums of `mean` lists by their lengths; an empty list stays 0.

    TorchRec's own mean pooling divides lists of the other tables twice as soon as one table of the plan is row-wise.
    """

    def __init__(self, dims: dict[str, int], groups: dict[str, list[str]], lists: set[str]) -> None:
        super().__init__()
        self.lists: list[tuple[str, str, slice]] = []
        for group, names in groups.items():
            start = 0
            for name in names:
                stop = start + dims[name.removesuffix(ALONE)]
                if name in lists:
                    self.lists.append((group, name, slice(start, stop)))
                start = stop

    def forward(self, ids: KeyedJaggedTensor, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shares = {group: torch.ones_like(sum_BD) for group, sum_BD in sums.items()}
        for group, name, columns in self.lists:
            shares[group][:, columns] = 1.0 / ids[name].lengths().clamp(min=1).unsqueeze(1)
        return {group: sum_BD * shares[group] for group, sum_BD in sums.items()}


class SequencePooling(nn.Module):
    """Single vectors -> one a row and feature, for the features of tables that an attention reads."""

    def __init__(self, schema: Schema, dims: dict[str, int], layers: tuple[int, ...], guard: GradientGuard) -> None:
        super().__init__()
        self.guard = guard
        self.features = [f for f in schema.features if f.is_id and is_sequence_table(str(f.table), schema)]
        self.targets = {f.name: schema.target(f).name for f in self.features if f.pooling == "attention"}
        self.attention = nn.ModuleDict(
            {
                f"list_{f.name}": TargetAttention(dims[f.name], layers=layers, positions=int(f.max_length or 0) if f.positions else 0)
                for f in self.features
                if f.name in self.targets
            }
        )

    def forward(self, collections: Sequence[dict[str, JaggedTensor]]) -> KeyedTensor:
        found = {name: vectors for collection in collections for name, vectors in collection.items()}
        single: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        pooled: dict[str, torch.Tensor] = {}
        for feature in self.features:
            lengths_B = found[feature.name].lengths()
            vector_MD = self.guard.single(feature.name, found[feature.name].values().float(), lengths_B)
            pool = pool_sum if feature.kind == "id" or feature.pooling == "sum" else pool_mean
            single[feature.name], pooled[feature.name] = (vector_MD, lengths_B), pool(vector_MD, lengths_B)
        for name, target in self.targets.items():
            pooled[name + ALONE] = pooled[name]
            pooled[name] = self.attention[f"list_{name}"](pooled[target], *single[name])
        return KeyedTensor.from_tensor_list(list(pooled), list(pooled.values()))


class Lookup(nn.Module):
    """Pooled vectors of each side's features, concatenated in recipe order.

    Only calls its submodules, because the training pipeline traces it with torch.fx.

    Args:
        gradient_bound: see GradientGuard, through which all gradients go to the tables.

    Shapes:
        input: ids of B rows. output: {side: [B, sum of the dims of the side's features]}, without sides that have none. A side with
        attention is there twice: as `side`, and as `side_alone` with means in place of attention, for what may not see the target.
    """

    def __init__(
        self, collections: Collections, schema: Schema, attention_layers: tuple[int, ...] = (36,), gradient_bound: float | None = None
    ) -> None:
        super().__init__()
        self.guard = GradientGuard(gradient_bound)
        self.embedding_bags, self.embeddings = collections
        dims = _dims(collections)
        groups = _groups(schema)
        self.regroup = Regroup(groups)
        means = {f.name for f in schema.features if f.kind == "ids" and f.pooling == "mean"}
        sequence_features = {f.name for f in schema.features if f.is_id and is_sequence_table(str(f.table), schema)}
        self.mean_pooling = MeanPooling(dims, groups, means - sequence_features)
        if self.embeddings:
            self.sequence_pooling = SequencePooling(schema, dims, attention_layers, self.guard)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        pooled = []
        if self.embedding_bags is not None:
            pooled.append(self.guard(self.embedding_bags(ids)))
        if self.embeddings:
            pooled.append(self.sequence_pooling([collection(ids) for collection in self.embeddings]))
        return self.mean_pooling(ids, self.regroup(pooled))


def _dims(collections: Collections) -> dict[str, int]:
    """{feature: width of its vector}."""
    bags, sequences = collections
    configs: list[Any] = [*(bags.embedding_bag_configs() if bags else ())]
    for collection in sequences:
        assert isinstance(collection, EmbeddingCollection)
        configs += collection.embedding_configs()
    return {name: config.embedding_dim for config in configs for name in config.feature_names}


def _groups(schema: Schema) -> dict[str, list[str]]:
    """{side, and side_alone where that differs: the features that make it up}."""
    groups: dict[str, list[str]] = {}
    for side in SIDES:
        features = [f for f in schema.features if f.is_id and f.side == side]
        if features:
            groups[side] = [f.name for f in features]
        if any(f.pooling == "attention" for f in features):
            groups[side + ALONE] = [alone(f) for f in features]
    return groups


def alone(feature: Feature) -> str:
    """The name of a feature's vector that depends on its own side only."""
    return feature.name + ALONE if feature.pooling == "attention" else feature.name
