"""The model with its losses: what the training pipeline runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..datasets.batch import Batch
from ..datasets.schema import Schema
from .balance import Fixed
from .heads import Head, Task, make_head
from .losses import sum_over_ranks, world_size
from .model import Outputs, Recommender, RetrievalSection


class StepReport(NamedTuple):
    """losses_L: each loss's mean over the rows of all ranks that count for it; the tasks, then retrieval if there is one."""

    losses_L: torch.Tensor


class Objective(nn.Module):
    """Training: one loss for this rank's rows. Evaluation: predictions.

    The mean of a loss is over the rows of all ranks where it counts; a mean of local means would be another loss, as ranks
    hold different numbers of clicks.

    Raises:
        FloatingPointError: a loss is not finite. Every rank raises it, before the backward pass touches a table.
    """

    def __init__(self, tasks: Sequence[Task], schema: Schema, retrieval: RetrievalSection | None) -> None:
        super().__init__()
        self.heads = nn.ModuleList(make_head(task, t, schema) for t, task in enumerate(tasks))
        self.loss_names = [task.name for task in tasks] + (["retrieval"] if retrieval else [])
        self.retrieval_task = retrieval.check(schema) if retrieval else None
        self.balancer = Fixed([task.weight for task in tasks] + ([retrieval.weight] if retrieval else []))

    def _heads(self) -> Iterator[Head]:
        return cast(Iterator[Head], iter(self.heads))

    def _sums(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """[L, 3]: of each loss, over this rank's rows: sum of losses, sum of counts, sum of residual scales."""
        rows = []
        for head in self._heads():
            loss_B, count_B = head.loss(outputs.logits_BT, batch)
            # where, not a product: a row that does not count must not matter even if its loss overflows.
            loss_B = torch.where(count_B > 0, loss_B, 0.0)
            rows.append(
                torch.stack([(loss_B * count_B).sum(), count_B.sum(), (head.residual_scale(outputs.logits_BT, batch) * count_B).sum()])
            )
        if outputs.affinity_B is not None:
            task = self.retrieval_task
            count_B = batch.weight_B * batch.known_BT[:, task]
            loss_B = F.binary_cross_entropy_with_logits(outputs.affinity_B, batch.labels_BT[:, task], reduction="none")
            rows.append(torch.stack([(loss_B * count_B).sum(), count_B.sum(), count_B.new_zeros(())]))
        return torch.stack(rows)

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, StepReport | torch.Tensor]:
        if not self.training:
            return outputs.logits_BT.new_zeros(()), torch.stack([head.prediction(outputs.logits_BT) for head in self._heads()], dim=1)
        local_L3 = self._sums(outputs, batch)
        global_L3 = sum_over_ranks(local_L3)
        count_L = global_L3[:, 1].clamp(min=torch.finfo(torch.float32).tiny)
        losses_L = global_L3[:, 0] / count_L
        if not bool(torch.isfinite(global_L3).all()):
            bad = [name for name, sums in zip(self.loss_names, global_L3, strict=True) if not bool(torch.isfinite(sums).all())]
            raise FloatingPointError(
                f"the loss of {', '.join(bad)} is not finite; lower train.lr and train.embedding_lr, or check the data"
            )
        for head, (_, count, residual_scale) in zip(self._heads(), global_L3, strict=False):
            head.observe(residual_scale, count)
        # Gradients are averaged over ranks, so this rank's part is scaled up by their number.
        loss = (self.balancer(losses_L) * local_L3[:, 0] / count_L).sum() * world_size()
        return loss, StepReport(losses_L)


class TrainTask(nn.Module):
    """Model, then objective. Only calls its submodules, because the training pipeline traces it with torch.fx."""

    def __init__(self, model: Recommender, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[torch.Tensor, StepReport | torch.Tensor]:
        return self.objective(self.model(batch), batch)
