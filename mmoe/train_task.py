"""The model with its losses: what the training pipeline runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..datasets.batch import Batch
from ..datasets.schema import Schema
from ..embeddings.dynamic.fresh import FreshRows
from .balance import Fixed
from .heads import Head, Task, make_head
from .losses import sum_over_ranks, world_size
from .model import Outputs, Recommender, RetrievalSection


class StepReport(NamedTuple):
    """losses_L: each loss's mean over the rows of all ranks that count for it; the tasks, then retrieval if there is one."""

    losses_L: torch.Tensor
    stop: bool
    """Whether any rank was asked to stop."""
    bad_losses: tuple[str, ...]
    """Names of the losses that are not finite, on all ranks. If there are any, nothing was learned from this step."""
    row_B: torch.Tensor
    """As in the batch."""
    bad_B: torch.Tensor | None
    """Rows of this rank with a loss that is not finite. None where all losses are."""


class Counted(NamedTuple):
    """One loss of each row, as often as the row counts. All shapes [B]."""

    loss_B: torch.Tensor
    count_B: torch.Tensor
    residual_scale_B: torch.Tensor

    @classmethod
    def of(cls, loss_B: torch.Tensor, count_B: torch.Tensor, residual_scale_B: torch.Tensor) -> Counted:
        # where, not a product alone: a row that does not count must not matter even if its loss overflows.
        counted = [torch.where(count_B > 0, value_B, 0.0) * count_B for value_B in (loss_B, residual_scale_B)]
        return cls(counted[0], count_B, counted[1])

    def sums(self) -> torch.Tensor:
        """[3]: of losses, counts, residual scales."""
        return torch.stack([value_B.sum() for value_B in self])


class Objective(nn.Module):
    """Training: one loss for this rank's rows. Evaluation: predictions.

    The mean of a loss is over the rows of all ranks where it counts; a mean of local means would be another loss, as ranks
    hold different numbers of clicks. The last batch of an epoch may hold few rows: its loss is scaled by their share of a full
    batch, so that every row of an epoch weighs the same. Unscaled, 20 rows of a table's fresh ids can wreck calibration.

    Where a loss is not finite on any rank, the step is skipped on all of them: the loss to be differentiated depends on nothing, so
    that no weight has a gradient, no optimizer does anything, and no head takes anything in.
    """

    def __init__(self, tasks: Sequence[Task], schema: Schema, retrieval: RetrievalSection | None) -> None:
        super().__init__()
        self.heads = nn.ModuleList(make_head(task, t, schema) for t, task in enumerate(tasks))
        self.loss_names = [task.name for task in tasks] + (["retrieval"] if retrieval else [])
        self.retrieval_task = retrieval.check(schema) if retrieval else None
        self.rows_of_full_batch = schema.data.batch_size * world_size()
        self.stop_asked = False
        """Of this rank, from outside. All ranks learn it with the next step."""
        self.balancer = Fixed([task.weight for task in tasks] + ([retrieval.weight] if retrieval else []))

    def _heads(self) -> Iterator[Head]:
        return cast(Iterator[Head], iter(self.heads))

    def _counted(self, outputs: Outputs, batch: Batch) -> list[Counted]:
        """Each loss of this rank's rows."""
        counted = [
            Counted.of(*head.loss(outputs.logits_BT, batch), head.residual_scale(outputs.logits_BT, batch)) for head in self._heads()
        ]
        if outputs.affinity_B is not None:
            task = self.retrieval_task
            count_B = batch.weight_B * batch.known_BT[:, task]
            loss_B = F.binary_cross_entropy_with_logits(outputs.affinity_B, batch.labels_BT[:, task], reduction="none")
            counted.append(Counted.of(loss_B, count_B, torch.zeros_like(count_B)))
        return counted

    def label_means(self, batch: Batch) -> torch.Tensor:
        """[T]: the logit that expects each label's mean over the known rows of all ranks. Collective."""
        known_BT = batch.known_BT * batch.weight_B[:, None]
        target_BT = torch.stack([head.target(batch) for head in self._heads()], dim=1)
        sums_T, counts_T = sum_over_ranks(torch.stack([(target_BT * known_BT).sum(0), known_BT.sum(0)]))
        means_T = sums_T / counts_T.clamp(min=torch.finfo(torch.float32).tiny)
        logits_T = torch.stack([head.logit_of_mean(mean) for head, mean in zip(self._heads(), means_T, strict=True)])
        return torch.where(counts_T > 0, logits_T, 0.0)

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, StepReport | torch.Tensor]:
        if not self.training:
            return outputs.logits_BT.new_zeros(()), torch.stack([head.prediction(outputs.logits_BT) for head in self._heads()], dim=1)
        counted_L = self._counted(outputs, batch)
        local_L3 = torch.stack([counted.sums() for counted in counted_L])
        others_13 = torch.stack([(batch.row_B >= 0).sum().to(local_L3), local_L3.new_tensor(self.stop_asked), local_L3.new_zeros(())])
        totals = sum_over_ranks(torch.cat([local_L3, others_13[None]]))
        global_L3, num_rows = totals[:-1], totals[-1, 0]
        count_L = global_L3[:, 1].clamp(min=torch.finfo(torch.float32).tiny)
        losses_L = global_L3[:, 0] / count_L
        *sums_L, (_, stop, _) = totals.tolist()  # the one time that a GPU is waited for
        bad = tuple(name for name, sums in zip(self.loss_names, sums_L, strict=True) if not all(map(math.isfinite, sums)))
        if bad:
            bad_B = torch.stack([~torch.isfinite(value_B) for counted in counted_L for value_B in counted]).any(0)
            return losses_L.new_zeros((), requires_grad=True), StepReport(losses_L, stop > 0, bad, batch.row_B, bad_B)
        for head, (_, count, residual_scale) in zip(self._heads(), global_L3, strict=False):
            head.observe(residual_scale, count)
        loss = (self.balancer(losses_L) * local_L3[:, 0] / count_L).sum() * (num_rows / self.rows_of_full_batch)
        # Gradients are averaged over ranks, so this rank's part is scaled up by their number.
        return loss * world_size(), StepReport(losses_L, stop > 0, (), batch.row_B, None)


class TrainTask(nn.Module):
    """Fresh rows, model, objective. Only calls its submodules, because the training pipeline traces it with torch.fx."""

    def __init__(self, model: Recommender, objective: Objective, fresh_rows: FreshRows | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.fresh_rows = fresh_rows

    def forward(self, batch: Batch) -> tuple[torch.Tensor, StepReport | torch.Tensor]:
        if self.fresh_rows is not None:
            self.fresh_rows(batch.fresh_A3)
        return self.objective(self.model(batch), batch)

    @torch.no_grad()
    def start_at_label_means(self, batch: Batch) -> None:
        """Set the output biases so that training begins at the label means, not with finding them. Collective."""
        logits_T = self.objective.label_means(batch)
        self.model.tower.task_outputs.bias_GO.copy_(logits_T[:, None])
        if self.objective.retrieval_task is not None:
            self.model.tower.affinity_bias.copy_(logits_T[self.objective.retrieval_task])
