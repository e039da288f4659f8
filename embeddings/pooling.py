"""Lists of vectors, one list a row -> one vector a row: sum, mean, and attention to a target. No list is padded.

A batch of lists is jagged: the vectors of all rows one after the other, and how many belong to each row.

    lengths_B   2, 0, 3
    vector_MD   a a c c c       sum -> [a + a, 0, c + c + c]

Shapes: B rows, M vectors in all lists, D width of a vector, H width of a hidden layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def list_ends(lengths_B: torch.Tensor) -> torch.Tensor:
    """Where each list ends in the vectors of all lists [B], int64."""
    return lengths_B.cumsum(0, dtype=torch.int64)


class _Sum(torch.autograd.Function):
    """The sum of each list. Its gradient is `_Repeat`, whose gradient is this one: without atomics, so that no run differs from another."""

    @staticmethod
    def forward(ctx: Any, vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(lengths_B)
        ctx.num_vectors = len(vector_MD)
        index_M = torch.arange(len(vector_MD), device=vector_MD.device)
        offsets = F.pad(list_ends(lengths_B), (1, 0))
        return F.embedding_bag(index_M, vector_MD.contiguous(), offsets, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Repeat.apply(grads[0], *ctx.saved_tensors, ctx.num_vectors), None


class _Repeat(torch.autograd.Function):
    """The vector of each row, once for each place of its list."""

    @staticmethod
    def forward(ctx: Any, vector_BD: torch.Tensor, lengths_B: torch.Tensor, num_vectors: int) -> torch.Tensor:
        ctx.save_for_backward(lengths_B)
        return vector_BD.repeat_interleave(lengths_B, dim=0, output_size=num_vectors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Sum.apply(grads[0], *ctx.saved_tensors), None, None


def pool_sum(vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """The sum of each list [B, D]; 0 of an empty one. `lengths_B` sums to M. Differentiable any number of times."""
    return _Sum.apply(vector_MD, lengths_B)


def pool_mean(vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """The mean of each list [B, D]; 0 of an empty one."""
    return pool_sum(vector_MD, lengths_B) / lengths_B.clamp(min=1).unsqueeze(1)


def repeat_rows(vector_BD: torch.Tensor, lengths_B: torch.Tensor, num_vectors: int) -> torch.Tensor:
    """The vector of each row once for each place of its list [M, D]; M is given, lest a GPU be waited for."""
    return _Repeat.apply(vector_BD, lengths_B, num_vectors)


class TargetAttention(nn.Module):
    """The local activation unit of DIN (Zhou et al., KDD 2018, eq. 3): v = sum_j a(e_j, t) e_j, for the target t of the row.

    a is an MLP over [e_j, t, e_j - t, e_j * t]. Its weights are not normalised, so the length of v tells how strong the match is.

    Args:
        dim: D, of lists and target; they share a table.
        layers: widths of the hidden layers.
        positions: most places of a list, to learn a vector for each place, counted from the end: 0 is the newest. It is added to e_j
            inside a, and is 0 at first. 0: the order within a list means nothing.

    Shapes: target_BD, vector_MD, lengths_B; output [B, D], 0 for an empty list.
    """

    def __init__(self, dim: int, layers: Sequence[int] = (36,), positions: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(4 * dim, layers[0])
        self.rest = nn.Sequential()
        for inputs, outputs in itertools.pairwise([*layers, 1]):
            last = nn.Linear(inputs, outputs)
            self.rest.extend([nn.PReLU(), last])
        nn.init.ones_(last.bias)  # near the sum at first, so that lists teach their table from the first step
        self.place_PD = nn.Parameter(torch.zeros(positions, dim)) if positions else None

    def activation(self, target_BD: torch.Tensor, vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The weight a(e_j, t) of each vector [M, 1]."""
        key_MD, num_vectors = vector_MD, len(vector_MD)
        if self.place_PD is not None:
            last_M = repeat_rows(list_ends(lengths_B) - 1, lengths_B, num_vectors)
            key_MD = key_MD + F.embedding(last_M - torch.arange(num_vectors, device=last_M.device), self.place_PD)
        # The first layer, split by its inputs: what depends on the target alone is computed once a row, not once a place.
        key_HD, target_HD, difference_HD, product_HD = self.first.weight.chunk(4, dim=1)
        hidden_BH = F.linear(target_BD, target_HD - difference_HD, self.first.bias)
        product_MD = key_MD * repeat_rows(target_BD, lengths_B, num_vectors)
        hidden_MH = F.linear(key_MD, key_HD + difference_HD) + F.linear(product_MD, product_HD)
        return self.rest(hidden_MH + repeat_rows(hidden_BH, lengths_B, num_vectors))

    def forward(self, target_BD: torch.Tensor, vector_MD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        weight_M1 = self.activation(target_BD, vector_MD, lengths_B)
        return pool_sum(weight_M1.to(vector_MD.dtype) * vector_MD, lengths_B)
