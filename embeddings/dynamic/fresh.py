"""First vectors of ids that just got a row: a function of seed, table and id, whatever the row, the plan and the number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..tables import EmbeddingTable

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64, as signed numbers: 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB."""


class Part(NamedTuple):
    """A rectangle of a table's weights or optimizer state that this rank holds, sharing its memory."""

    tensor: torch.Tensor
    first_row: int
    first_column: int | None = None
    """None for what has one value a row."""


class Held(NamedTuple):
    """What this rank holds of one dynamic table."""

    table: EmbeddingTable
    weights: Sequence[Part]
    states: Sequence[Part]


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits, as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """int64, as `datasets.ids.mix`; here in torch, for any device."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def first_vectors(table: EmbeddingTable, seed: int, code_A: torch.Tensor) -> torch.Tensor:
    """float32 [A, dim]: normal numbers of deviation `init` (Box and Muller, 1958), the same for an id wherever they are computed."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {table.name}".encode()).digest()[:8], "little", signed=True)
    place_D = torch.arange(table.dim // 2, device=code_A.device)
    bits_AD = _mix(_mix(code_A ^ key)[:, None] + place_D * _GOLDEN)
    radius_AD = torch.sqrt(-2.0 * torch.log((_shifted(bits_AD, 40).double() + 1.0) / 2**24))
    angle_AD = (bits_AD & (2**24 - 1)).double() * (2 * math.pi / 2**24)
    return (table.init * torch.cat([radius_AD * angle_AD.cos(), radius_AD * angle_AD.sin()], dim=1)).float()


class FreshRows(nn.Module):
    """Begins rows anew, before the batch that gave them to other ids is looked up: by then the last batch of their old ids is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.held: dict[int, Held] = {}

    def bind(self, held: Mapping[int, Held]) -> None:
        """Say what this rank holds of the dynamic tables, by the numbers of `DynamicIds`. Only known once the model is sharded."""
        self.held = dict(held)

    @torch.no_grad()
    def forward(self, fresh_A3: torch.Tensor) -> None:
        for number, (table, weights, states) in self.held.items():
            _, row_A, code_A = fresh_A3[fresh_A3[:, 0] == number].unbind(1)
            if len(row_A) == 0:
                continue
            vector_AD = first_vectors(table, self.seed, code_A)
            for part in weights:
                here_A, place_A = _here(part, row_A)
                assert part.first_column is not None
                columns = slice(part.first_column, part.first_column + part.tensor.shape[1])
                part.tensor[place_A] = vector_AD[here_A, columns].to(part.tensor.dtype)
            for part in states:
                part.tensor[_here(part, row_A)[1]] = 0


def _here(part: Part, row_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the rows are in a part, and where in it."""
    place_A = row_A - part.first_row
    here_A = (place_A >= 0) & (place_A < len(part.tensor))
    return here_A, place_A[here_A]
