"""Losses of one row, and means over the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F


def log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler, 2012). Values above -1e-38 are cut to about that."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -0.6931
    # The second branch is kept away from 0, where its gradient, though not taken, would be NaN.
    return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(torch.where(near_zero, -2.0, x))))


def product_cross_entropy(logits_B: Sequence[torch.Tensor], label_B: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the product of probabilities against one label, in log space (ESMM; Ma et al., SIGIR 2018, eq. 5)."""
    log_p_B = sum((F.logsigmoid(logit) for logit in logits_B), torch.zeros_like(label_B))
    return -(label_B * log_p_B + (1 - label_B) * log_one_minus_exp(log_p_B))


def log_huber(log_seconds_B: torch.Tensor, seconds_B: torch.Tensor, delta: float) -> torch.Tensor:
    """Huber loss between predicted and true log(1 + seconds), divided by delta, so that small deltas tend to the absolute error."""
    return F.huber_loss(log_seconds_B, torch.log1p(seconds_B), reduction="none", delta=delta) / delta


def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, without gradient."""
    total = sums.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
