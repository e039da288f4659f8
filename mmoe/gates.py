"""Gates: how much each task listens to each expert."""

from __future__ import annotations

import torch
from torch import nn

from .experts import BatchedLinear


class Gates(nn.Module):
    """G softmax gates over E experts: g_k(x) = softmax(W_k x) (Ma et al., KDD 2018, eq. 7).

    Args:
        visible_GE: which experts a gate may use; the others get weight 0. All, unless given.

    Shapes: inputs x_BI (shared) or x_GBI, expert outputs [E, B, H]; output [G, B, H].
    """

    def __init__(self, gates: int, inputs: int, experts: int, visible_GE: torch.Tensor | None = None) -> None:
        super().__init__()
        self.linear = BatchedLinear(gates, inputs, experts)
        hidden_GE = torch.zeros(gates, experts, dtype=torch.bool) if visible_GE is None else ~visible_GE
        self.register_buffer("hidden_G1E", hidden_GE.unsqueeze(1), persistent=False)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Gate weights [G, B, E], each row summing to 1."""
        return torch.softmax(self.linear(x).masked_fill(self.hidden_G1E, float("-inf")), dim=-1)

    def forward(self, x: torch.Tensor, experts_EBH: torch.Tensor) -> torch.Tensor:
        weights_BGE = self.weights(x).transpose(0, 1)
        return torch.bmm(weights_BGE, experts_EBH.transpose(0, 1)).transpose(0, 1)
