"""Ids -> {side: vectors}. Vectors are regrouped by name: a KeyedTensor's own column order follows the sharding plan."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.regroup import KTRegroupAsDict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ..datasets.schema import SIDES, Schema


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

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        return self.regroup([self.embedding_bags(ids)])
