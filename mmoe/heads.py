"""Heads: one number from a task's tower -> its loss a row, and its prediction."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import nn

from ..datasets.batch import Batch
from ..datasets.schema import Label, Schema, reject_foreign_keys
from .losses import log_huber, product_cross_entropy

SMEARING_DECAY = 0.99


class Task(Label):
    """`[[tasks]]`: a label and how it is learned."""

    weight: NonNegativeFloat = 1.0
    """Factor of the task's loss."""
    estimator: Literal["masked", "esmm"] = "masked"
    """binary with `given`. masked: loss over the rows where the condition holds. esmm: the product of probabilities over all rows."""
    loss: Literal["log_huber"] = "log_huber"
    """duration: Huber loss on log(1 + seconds)."""
    delta: PositiveFloat = 1.0
    """duration: where the Huber loss turns from square to linear. Small values fit the median of the logarithm."""
    predict: Literal["mean", "median"] = "mean"
    """duration: predict the calibrated mean, or the centre of the log-scale fit, which has the smaller absolute error."""

    @model_validator(mode="after")
    def _keys_go_with_kind(self) -> Task:
        keys = dict.fromkeys(("loss", "delta", "predict"), ("duration",))
        reject_foreign_keys(self, f"task '{self.name}'", keys)
        if self.estimator == "esmm" and (self.kind != "binary" or self.given is None):
            raise ValueError(f"task '{self.name}': estimator 'esmm' needs kind 'binary' and a 'given' task")
        return self


class Head(nn.Module):
    """What a task does with its number. All shapes [B], from logits_BT and the batch."""

    def loss(self, logits_BT: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each row, and how much each counts."""
        raise TypeError("a head has a loss")

    def prediction(self, logits_BT: torch.Tensor) -> torch.Tensor:
        """The prediction of each row, given the task's condition if it has one."""
        raise TypeError("a head has a prediction")

    def residual_scale(self, logits_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What `observe` wants summed over the rows that count; nothing, for most."""
        return torch.zeros_like(batch.weight_B)

    def observe(self, residual_scale_sum: torch.Tensor, count: torch.Tensor) -> None:
        """Take in one step's sums over all ranks."""

    def target(self, batch: Batch) -> torch.Tensor:
        """What the head's expectation is of, where the label is known."""
        raise TypeError("a head has a target")

    def logit_of_mean(self, mean: torch.Tensor) -> torch.Tensor:
        """The logit that expects `mean` of the target."""
        raise TypeError("a head has a logit of a mean")


class BinaryHead(Head):
    """A probability, given the task's condition if it has one.

    masked: mean over rows where the condition holds. esmm: BCE(p * p_ancestors, y * y_ancestors) over all rows.
    """

    def __init__(self, task: Task, index: int, ancestors: list[int]) -> None:
        super().__init__()
        self.index, self.chain = index, [index, *ancestors]
        self.over_all_rows = task.estimator == "esmm"

    def loss(self, logits_BT: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        label_B = batch.labels_BT[:, self.index]  # 0 where the condition fails, so it is also the label of the product
        if self.over_all_rows:
            # The product is known where the label is, and where an ancestor's is 0.
            known_B = batch.known_BT[:, self.index] | (batch.known_BT & (batch.labels_BT == 0))[:, self.chain[1:]].any(1)
            return product_cross_entropy([logits_BT[:, i] for i in self.chain], label_B), batch.weight_B * known_B
        loss_B = F.binary_cross_entropy_with_logits(logits_BT[:, self.index], label_B, reduction="none")
        return loss_B, batch.weight_B * batch.known_BT[:, self.index]

    def prediction(self, logits_BT: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits_BT[:, self.index])

    def target(self, batch: Batch) -> torch.Tensor:
        return batch.labels_BT[:, self.index]

    def logit_of_mean(self, mean: torch.Tensor) -> torch.Tensor:
        return torch.logit(mean, eps=1e-4)


class DurationHead(Head):
    """Seconds. The tower predicts m, the centre of log(1 + seconds).

    The mean is exp(m) * S - 1 with Duan's smearing factor S = mean(exp(log(1 + y) - m)) (Duan, JASA 1983), a moving mean over the
    trained rows of all ranks.
    """

    smearing_2: torch.Tensor
    """Decayed sums of residual scales and of counts."""

    def __init__(self, task: Task, index: int) -> None:
        super().__init__()
        self.index, self.delta, self.predicts_mean = index, task.delta, task.predict == "mean"
        self.cap = float("inf") if task.cap is None else task.cap
        self.register_buffer("smearing_2", torch.zeros(2, dtype=torch.float64))

    def loss(self, logits_BT: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss_B = log_huber(logits_BT[:, self.index], batch.labels_BT[:, self.index], self.delta)
        return loss_B, batch.weight_B * batch.known_BT[:, self.index]

    def residual_scale(self, logits_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """exp(log(1 + y) - m) of each row."""
        return (1 + batch.labels_BT[:, self.index]) * torch.exp(-logits_BT[:, self.index].detach())

    def observe(self, residual_scale_sum: torch.Tensor, count: torch.Tensor) -> None:
        self.smearing_2.mul_(SMEARING_DECAY).add_(torch.stack([residual_scale_sum, count]).to(self.smearing_2))

    def prediction(self, logits_BT: torch.Tensor) -> torch.Tensor:
        """Seconds in [0, cap]."""
        m_B = logits_BT[:, self.index]
        if self.predicts_mean and self.smearing_2[1] > 0:
            seconds_B = torch.exp(m_B) * (self.smearing_2[0] / self.smearing_2[1]).float() - 1
        else:
            seconds_B = torch.expm1(m_B)
        return seconds_B.clamp(0.0, self.cap)

    def target(self, batch: Batch) -> torch.Tensor:
        return torch.log1p(batch.labels_BT[:, self.index])

    def logit_of_mean(self, mean: torch.Tensor) -> torch.Tensor:
        return mean


def make_head(task: Task, index: int, schema: Schema) -> Head:
    if task.kind == "duration":
        return DurationHead(task, index)
    return BinaryHead(task, index, schema.ancestors(task))
