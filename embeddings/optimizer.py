"""How tables learn: fused into the backward pass, or by the same rule on replicated (data-parallel) tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]

_FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


def fused_params(optimizer: TableOptimizer, lr: float, eps: float) -> dict[str, Any]:
    """What the sharder passes to FBGEMM's kernels: w -= lr * g / (sqrt(sum g^2) + eps), by row or by element."""
    return {"optimizer": _FUSED[optimizer], "learning_rate": lr, "eps": eps}


def replicated_optimizer(optimizer: TableOptimizer, params: Iterable[torch.nn.Parameter], lr: float, eps: float) -> torch.optim.Optimizer:
    """The same update for tables that every rank holds whole."""
    if optimizer == "rowwise_adagrad":
        return RowWiseAdagrad(params, lr=lr, eps=eps)
    if optimizer == "adagrad":
        return torch.optim.Adagrad(params, lr=lr, eps=eps)
    return torch.optim.SGD(params, lr=lr)
