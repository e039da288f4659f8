"""How tables learn: fused into the backward pass, or by the same rule on replicated (data-parallel) tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from ..datasets.schema import InputError
from .tables import PREFIX, EmbeddingTable

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]

_FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}
TAKES_WEIGHT_DECAY = ("rowwise_adagrad", "adam")
"""FBGEMM's other kernels take a weight decay and ignore it."""


@dataclass(frozen=True)
class TableTraining:
    """The optimizer of all tables, its rates, and which of them a table sets for itself.

    rowwise_adagrad, adagrad: w -= lr * g / (sqrt(sum g^2) + eps), the sum by row (mean over its columns) or by element (Duchi et al.,
    JMLR 2011). sgd: w -= lr * g. adam: Kingma and Ba, ICLR 2015. Weight decay adds weight_decay * w to g. All touch the rows that a
    step looks up, and no others.
    """

    optimizer: TableOptimizer
    lr: float
    eps: float
    weight_decay: float = 0.0

    def lr_of(self, table: EmbeddingTable) -> float:
        return self.lr if table.lr is None else table.lr

    def weight_decay_of(self, table: EmbeddingTable) -> float:
        return self.weight_decay if table.weight_decay is None else table.weight_decay

    def check(self, tables: Iterable[EmbeddingTable]) -> None:
        """Raise ValueError where a table asks for what the optimizer does not do."""
        for table in tables:
            if self.weight_decay_of(table) and self.optimizer not in TAKES_WEIGHT_DECAY:
                raise ValueError(
                    f"table '{table.name}': weight decay goes with train.embedding_optimizer = {' or '.join(map(repr, TAKES_WEIGHT_DECAY))}"
                )

    def check_device(self, device_type: str) -> None:
        """
        Raises:
            InputError: FBGEMM has no kernel of the optimizer for the device.
        """
        if self.optimizer == "adam" and device_type != "cuda":
            raise InputError(
                "train.embedding_optimizer = 'adam' needs CUDA: FBGEMM has no CPU kernel of it; use 'rowwise_adagrad', 'adagrad' or 'sgd'"
            )

    def fused_params(self) -> dict[str, Any]:
        """What the sharder passes to FBGEMM's kernels, for tables that set nothing for themselves."""
        return {
            "optimizer": _FUSED[self.optimizer],
            "learning_rate": self.lr,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "weight_decay_mode": WeightDecayMode.L2 if self.weight_decay else WeightDecayMode.NONE,
        }

    def attach(self, collection: nn.Module, tables: Iterable[EmbeddingTable]) -> None:
        """Leave each table's own rates where TorchRec's sharding looks for them: on its parameter."""
        by_name = {PREFIX + table.name: table for table in tables}
        for name, parameter in collection.named_parameters():
            table = by_name[name.split(".")[-2]]
            own: dict[str, Any] = {}
            if table.lr is not None:
                own["learning_rate"] = table.lr
            if table.weight_decay is not None:
                own |= {"weight_decay": table.weight_decay, "weight_decay_mode": WeightDecayMode.L2}
            parameter._optimizer_kwargs = [own]  # type: ignore[attr-defined]

    def replicated(self, parameters: Mapping[str, nn.Parameter], tables: Iterable[EmbeddingTable]) -> torch.optim.Optimizer:
        """The same update for tables that every rank holds whole: {table: weight}."""
        groups = [{"params": [parameters[table.name]], "lr": self.lr_of(table)} for table in tables if table.name in parameters]
        if self.optimizer == "rowwise_adagrad":
            return RowWiseAdagrad(groups, lr=self.lr, eps=self.eps)
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(groups, lr=self.lr, eps=self.eps)
        assert self.optimizer == "sgd", "the plan replicates no table that Adam trains"
        return torch.optim.SGD(groups, lr=self.lr)
