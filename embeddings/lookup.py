"""Ids -> {side: vectors}. Vectors are regrouped by name: a KeyedTensor's own column order follows the sharding plan."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.regroup import KTRegroupAsDict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ..datasets.schema import SIDES, Schema


class MeanPooling(nn.Module):
    """Divides the pooled sums of `mean` lists by their lengths; an empty list stays 0.

    TorchRec's own mean pooling divides lists of the other tables twice as soon as one table of the plan is row-wise.
    """

    def __init__(self, dims: dict[str, int], schema: Schema) -> None:
        super().__init__()
        self.lists: list[tuple[str, str, slice]] = []
        for side in SIDES:
            start = 0
            for feature in (f for f in schema.features if f.is_id and f.side == side):
                stop = start + dims[feature.name]
                if feature.kind == "ids" and feature.pooling == "mean":
                    self.lists.append((side, feature.name, slice(start, stop)))
                start = stop

    def forward(self, ids: KeyedJaggedTensor, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shares = {side: torch.ones_like(sum_BD) for side, sum_BD in sums.items()}
        for side, name, columns in self.lists:
            shares[side][:, columns] = 1.0 / ids[name].lengths().clamp(min=1).unsqueeze(1)
        return {side: sum_BD * shares[side] for side, sum_BD in sums.items()}


class Lookup(nn.Module):
    """Pooled vectors of each side's features, concatenated in recipe order.

    Only calls its submodules, because the training pipeline traces it with torch.fx.

    Shapes:
        input: ids of B rows. output: {side: [B, sum of the dims of the side's features]}, without sides that have none.
    """

    def __init__(self, embedding_bags: EmbeddingBagCollection, schema: Schema) -> None:
        super().__init__()
        names = {side: [f.name for f in schema.features if f.is_id and f.side == side] for side in SIDES}
        sides = [side for side in SIDES if names[side]]
        self.embedding_bags = embedding_bags
        self.regroup = KTRegroupAsDict([names[side] for side in sides], sides)
        dims = {name: config.embedding_dim for config in embedding_bags.embedding_bag_configs() for name in config.feature_names}
        self.mean_pooling = MeanPooling(dims, schema)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        return self.mean_pooling(ids, self.regroup([self.embedding_bags(ids)]))
