"""How task losses become one loss. Every rank solves the same weights; there is one backward of their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ..datasets.schema import Section


class BalanceSection(Section):
    """`[balance]`: how task losses become one loss."""

    method: Literal["fixed"] = "fixed"
    """fixed: the tasks' own weights."""


class Fixed(nn.Module):
    """Constant weights. Shapes: losses_T -> weights_T."""

    weights_T: torch.Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights_T", torch.tensor(weights), persistent=False)

    def forward(self, losses_T: torch.Tensor) -> torch.Tensor:
        return self.weights_T.to(losses_T)
