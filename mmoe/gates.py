"""Gates: how much each task listens to each expert."""

from __future__ import annotations

import torch
from torch import nn

from .axes import Axes, Axis, within
from .experts import BatchedLinear

QUIET = 10.0
"""How far below the mean logit an expert begins that is added to a trained gate."""


class Gates(nn.Module):
    """G softmax gates over E experts: g_k(x) = softmax(W_k x) (Ma et al., KDD 2018, eq. 7).

    Args:
        visible_GE: which experts a gate may use; the others get weight 0. All, unless given.

    Shapes: inputs x_BI (shared) or x_GBI, expert outputs [E, B, H]; output [G, B, H].
    """

    hidden_G1E: torch.Tensor

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

    def axes(self, gates: Axis, inputs: Axis, experts: Axis) -> dict[str, Axes]:
        """As BatchedLinear.axes."""
        return within("linear", self.linear.axes(gates, inputs, experts))

    @torch.no_grad()
    def start_new_experts(self, known_G: torch.Tensor, known_E: torch.Tensor) -> None:
        """Let gates that were trained begin with next to nothing of experts that were not.

        A new expert's logit is the mean of the trained ones', less `QUIET`. As the mean of exponentials is at least the exponential
        of the mean (Jensen), N new experts beside M have a share of at most N / M * e^-10 = N / M * 4.5e-5, whatever the input;
        that is small, and not too small for the gate to learn otherwise.

        Args:
            known_G, known_E: bool; which gates and experts were trained.
        """
        visible_GE = ~self.hidden_G1E.squeeze(1)
        trained_GE = visible_GE & known_E
        new_GE = visible_GE & ~known_E & known_G[:, None] & trained_GE.any(1, keepdim=True)
        share_GE = (trained_GE / trained_GE.sum(1, keepdim=True).clamp(min=1)).to(self.linear.weight_GIO)
        for weight, quiet in ((self.linear.weight_GIO, 0.0), (self.linear.bias_GO.unsqueeze(1), QUIET)):
            mean_GI1 = torch.bmm(weight, share_GE[:, :, None]) - quiet
            weight.copy_(torch.where(new_GE[:, None], mean_GI1, weight))
