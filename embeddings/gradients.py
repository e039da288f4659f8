"""Gradients of looked-up vectors, on their way back to the tables: finite, and bounded where the recipe says so.

Shapes: B rows, V width of all vectors of a row, M vectors in all lists, D width of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from .pooling import pool_sum

BAGS = ""
"""In place of a feature: those whose vectors are pooled by sum."""


class _Guarded(torch.autograd.Function):
    """The vectors as they are; their gradients go through the guard."""

    @staticmethod
    def forward(ctx: Any, vectors_BV: torch.Tensor, guard: GradientGuard, feature: str, widths: list[int]) -> torch.Tensor:
        ctx.guard, ctx.feature, ctx.widths = guard, feature, widths
        return vectors_BV.view_as(vectors_BV)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.guard.guarded(grads[0], ctx.feature, ctx.widths), None, None, None


class GradientGuard(nn.Module):
    """The boundary between tables and everything else: vectors pass as they are, their gradients pass guarded.

    A gradient whose norm is not finite becomes 0 and is counted, one that is longer than `bound` is scaled down to it. It is the gradient
    of one vector of one lookup, before a table sums those of all lookups of an id: a vector that was pooled by sum has the gradient
    of the sum. So it does not matter which rank holds which part of the table.

    Args:
        bound: on the norm of a vector's gradient, in units of this rank's loss.
    """

    zeroed: torch.Tensor
    """int64; gradients that were not finite, of this rank, since the process began."""

    def __init__(self, bound: float | None = None) -> None:
        super().__init__()
        self.bound = math.inf if bound is None else bound
        self.register_buffer("zeroed", torch.zeros((), dtype=torch.int64), persistent=False)
        self._bad: dict[str, torch.Tensor] = {}
        self._lengths: dict[str, torch.Tensor] = {}

    def forward(self, pooled: KeyedTensor) -> KeyedTensor:
        """Vectors that were pooled by sum."""
        widths = pooled.length_per_key()
        return KeyedTensor(pooled.keys(), widths, _Guarded.apply(pooled.values(), self, BAGS, widths))

    def single(self, feature: str, vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The single vectors of a feature's lists."""
        self._lengths[feature] = lengths_B
        return _Guarded.apply(vector_MD, self, feature, [vector_MD.shape[1]])

    def guarded(self, grad_BV: torch.Tensor, feature: str, widths: Sequence[int]) -> torch.Tensor:
        """The gradients of vectors that lie side by side."""
        self._bad.pop(feature, None)
        # The norm of all says that no vector's is too long, as a rule. A GPU would have to be waited for to know.
        if grad_BV.device.type == "cpu" and self._is_allowed(torch.linalg.vector_norm(grad_BV)):
            return grad_BV
        parts, bad_B = [], torch.zeros(len(grad_BV), dtype=torch.bool, device=grad_BV.device)
        start = 0
        for width, keys in itertools.groupby(widths):
            count = len(list(keys))
            grad_BKD = grad_BV[:, start : start + count * width].unflatten(1, (count, width))
            norm_BK1 = torch.linalg.vector_norm(grad_BKD, dim=2, keepdim=True)
            finite_BK1 = torch.isfinite(norm_BK1)
            # where, not a product: NaN times 0 is NaN.
            parts.append(torch.where(finite_BK1, grad_BKD * (self.bound / norm_BK1).clamp(max=1.0), 0.0).flatten(1))
            self.zeroed += (~finite_BK1).sum()
            bad_B |= ~finite_BK1.flatten(1).all(1)
            start += count * width
        self._bad[feature] = bad_B
        return torch.cat(parts, dim=1)

    def _is_allowed(self, norm: torch.Tensor) -> bool:
        return bool(norm <= self.bound) and bool(torch.isfinite(norm))

    def bad_rows(self) -> torch.Tensor | None:
        """Which rows of the last batch had a gradient that was not finite, [B]; None if no vector was too long or not finite."""
        rows = [
            bad if feature == BAGS else pool_sum(bad[:, None].float(), self._lengths[feature]).squeeze(1) > 0
            for feature, bad in self._bad.items()
        ]
        return torch.stack(rows).any(0) if rows else None
