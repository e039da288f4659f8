"""Many small layers as one: experts, gates and towers of one width are a batched matrix product, never a Python loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from .axes import Axes, Axis, units, within


class BatchedLinear(nn.Module):
    """G independent linear layers.

    An input that all share is one wide matrix product over their joined weights; inputs of their own are one `baddbmm`.

    Shapes: input x_BI (shared) or x_GBI; output [G, B, O].
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / (inputs + outputs))  # Glorot and Bengio, AISTATS 2010, eq. 16
        self.weight_GIO = nn.Parameter(torch.empty(groups, inputs, outputs).uniform_(-bound, bound))
        self.bias_GO = nn.Parameter(torch.zeros(groups, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups, inputs, outputs = self.weight_GIO.shape
        if x.dim() == 3:
            return torch.baddbmm(self.bias_GO.unsqueeze(1), x, self.weight_GIO)
        wide_IX = self.weight_GIO.transpose(0, 1).reshape(inputs, groups * outputs)
        return torch.addmm(self.bias_GO.flatten(), x, wide_IX).view(-1, groups, outputs).transpose(0, 1)

    def axes(self, groups: Axis, inputs: Axis, outputs: Axis | None = None) -> dict[str, Axes]:
        """What the places of each weight stand for, given what the groups, inputs and outputs do."""
        outputs = outputs or units(self.bias_GO.shape[1])
        return {"weight_GIO": (groups, inputs, outputs), "bias_GO": (groups, outputs)}


class BatchedMLP(nn.Module):
    """G independent MLPs: linear, ReLU, dropout for each width in `layers`.

    Shapes: input x_BI (shared) or x_GBI; output [G, B, layers[-1]].
    """

    def __init__(self, groups: int, inputs: int, layers: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        widths = [inputs, *layers]
        self.linears = nn.ModuleList(BatchedLinear(groups, i, o) for i, o in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = self.dropout(torch.relu(linear(x)))
        return x

    def axes(self, groups: Axis, inputs: Axis) -> dict[str, Axes]:
        """As BatchedLinear.axes."""
        found: dict[str, Axes] = {}
        for number, linear in enumerate(self.linears):
            assert isinstance(linear, BatchedLinear)
            found |= within(f"linears.{number}", linear.axes(groups, inputs))
            inputs = units(linear.bias_GO.shape[1])
        return found
