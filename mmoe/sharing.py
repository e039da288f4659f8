"""What tasks share: one class a method, one interface: x_BI -> z_TBH, the representation of each of T tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .axes import Axes, Axis, Block, numbered, units, within
from .experts import BatchedMLP
from .gates import Gates


class SharedBottom(nn.Module):
    """One MLP for all tasks: y_k = h_k(f(x)) (Caruana, 1997)."""

    def __init__(self, tasks: int, inputs: int, *, layers: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.tasks = tasks
        self.bottom = BatchedMLP(1, inputs, layers, dropout)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return self.bottom(x_BI).expand(self.tasks, -1, -1)

    def axes(self, tasks: Axis, inputs: Axis) -> dict[str, Axes]:
        """What the places of each weight stand for, given what the tasks and inputs are; so with every class here."""
        return within("bottom", self.bottom.axes(units(1), inputs))


class MMoE(nn.Module):
    """Shared experts, a gate a task: y_k = h_k(sum_i g_k(x)_i f_i(x)) (Ma et al., KDD 2018, eq. 6)."""

    def __init__(self, tasks: int, inputs: int, *, experts: int, layers: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.experts = BatchedMLP(experts, inputs, layers, dropout)
        self.gates = Gates(tasks, inputs, experts)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return self.gates(x_BI, self.experts(x_BI))

    def axes(self, tasks: Axis, inputs: Axis) -> dict[str, Axes]:
        experts = numbered("expert", self.gates.linear.bias_GO.shape[1])
        return within("experts", self.experts.axes(experts, inputs)) | within("gates", self.gates.axes(tasks, inputs, experts))


class ExtractionLevel(nn.Module):
    """One level of PLE (Tang et al., RecSys 2020, section 4.2): experts of each task and shared ones, a gate a group.

    Groups are the T tasks, then the shared one. A task's gate sees its own and the shared experts; the shared gate sees all.
    The last level has no shared gate.

    Shapes: input x_BI (first level) or x_GBI with G = T + 1; output [T + 1, B, H], or [T, B, H] from the last level.
    """

    owner_E: torch.Tensor

    def __init__(
        self, tasks: int, inputs: int, *, experts: int, task_experts: int, layers: Sequence[int], dropout: float, last: bool
    ) -> None:
        super().__init__()
        owner_E = torch.arange(tasks).repeat_interleave(task_experts).tolist() + [tasks] * experts
        gates = tasks if last else tasks + 1
        visible_GE = torch.tensor([[gate == tasks or owner in (gate, tasks) for owner in owner_E] for gate in range(gates)])
        self.register_buffer("owner_E", torch.tensor(owner_E), persistent=False)
        self.experts = BatchedMLP(len(owner_E), inputs, layers, dropout)
        self.gates = Gates(gates, inputs, len(owner_E), visible_GE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            return self.gates(x, self.experts(x))
        return self.gates(x[: self.gates.linear.weight_GIO.shape[0]], self.experts(x[self.owner_E]))

    def axes(self, tasks: Axis, inputs: Axis) -> dict[str, Axes]:
        groups, owners = (*tasks, Block("gate", "shared", 1)), self.owner_E.tolist()
        experts = tuple(Block("expert", f"{owners[:e].count(owner)} of {groups[owner].name}", 1) for e, owner in enumerate(owners))
        gates = groups[: self.gates.linear.bias_GO.shape[0]]
        return within("experts", self.experts.axes(experts, inputs)) | within("gates", self.gates.axes(gates, inputs, experts))


class PLE(nn.Module):
    """Progressive layered extraction: extraction levels stacked (Tang et al., RecSys 2020). One level is CGC."""

    def __init__(
        self, tasks: int, inputs: int, *, experts: int, task_experts: int, levels: int, layers: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width = layers[-1]
        self.levels = nn.ModuleList(
            ExtractionLevel(
                tasks,
                inputs if level == 0 else layers[-1],
                experts=experts,
                task_experts=task_experts,
                layers=layers,
                dropout=dropout,
                last=level == levels - 1,
            )
            for level in range(levels)
        )

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        x = x_BI
        for level in self.levels:
            x = level(x)
        return x

    def axes(self, tasks: Axis, inputs: Axis) -> dict[str, Axes]:
        found: dict[str, Axes] = {}
        for number, level in enumerate(self.levels):
            assert isinstance(level, ExtractionLevel)
            found |= within(f"levels.{number}", level.axes(tasks, inputs))
            inputs = units(self.width)
        return found
