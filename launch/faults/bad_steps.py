"""Steps with a loss or gradient that is not finite: said, counted, and too many end the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...datasets.row_groups import Slice, place_of_row
from ...datasets.schema import InputError
from ...mmoe.losses import sum_over_ranks
from ...mmoe.train_task import StepReport
from ..build import Built
from ..console import say
from ..distributed import Ranks

_SHOWN_ROWS = 3


class TooManyBadSteps(InputError):
    """On all ranks, at the same step."""


class BadSteps:
    """Of one run, from its beginning on. The same on all ranks.

    A step with a loss that is not finite changed nothing. One with finite losses whose dense gradient is not finite left the dense
    weights as they were, and gave the tables what was finite.

    Args:
        most: how many the run may have.
        slices: of the training split, in file order.
    """

    def __init__(self, most: int, slices: Sequence[Slice], built: Built, ranks: Ranks) -> None:
        self.most, self.slices, self.built, self.ranks = most, slices, built, ranks
        self.count = 0
        self.zeroed_gradients = 0
        """Gradients of looked-up vectors that were not finite and became 0, as of the last `state()`."""
        self._zeroed_before = 0

    def after_step(self, step: int, report: StepReport) -> None:
        """Take in a step. Collective where it was bad, which all ranks know.

        Raises:
            TooManyBadSteps: one more than the recipe allows.
        """
        if not report.bad_losses and self.built.optimizers.gradients_finite:
            return
        self.count += 1
        if report.bad_losses:
            what, done = f"the loss of {', '.join(report.bad_losses)} is not finite", "skipped"
            rows = self._named_rows(report.row_B, report.bad_B)
        else:
            what, done = "the losses are finite, but not their gradient", "dense weights kept"
            rows = self._named_rows(report.row_B, self.built.task.model.lookup.guard.bad_rows())
        if self.count > self.most:
            raise TooManyBadSteps(
                f"step {step}: {what}, in {rows}; this is bad step {self.count} of the run, and train.max_bad_steps = {self.most}; lower"
                " train.lr and train.embedding_lr, set train.clip_norm and train.embedding_clip_norm, check these rows, or raise"
                " train.max_bad_steps; then go on with --resume"
            )
        if self.ranks.is_first:
            say(f"step {step}: {what}, in {rows}; {done}; bad step {self.count} of at most {self.most}")

    def _named_rows(self, row_B: torch.Tensor, bad_B: torch.Tensor | None) -> str:
        """How many rows are to blame over all ranks, and where the first are; the whole batch, if none is by itself. Collective."""
        real_B = row_B >= 0
        rows = self._of_all_ranks(row_B[real_B & bad_B] if bad_B is not None else row_B[:0]) or self._of_all_ranks(row_B[real_B])
        named = "; ".join(place_of_row(self.slices, row) for row in rows[:_SHOWN_ROWS])
        more = len(rows) - _SHOWN_ROWS
        return f"{len(rows)} row{'s' * (len(rows) > 1)} ({named}{f'; and {more} more' if more > 0 else ''})"

    def _of_all_ranks(self, row_K: torch.Tensor) -> list[int]:
        return sorted(row for part in self.ranks.all_gather(row_K.tolist()) for row in part)

    def state(self) -> dict[str, int]:
        """For a checkpoint. Collective."""
        self.zeroed_gradients = self._zeroed_before + int(sum_over_ranks(self.built.task.model.lookup.guard.zeroed))
        return self.report()

    def load(self, state: Mapping[str, Any]) -> None:
        self.count = state["bad_steps"]
        self.zeroed_gradients = self._zeroed_before = state["zeroed_gradients"]

    def report(self) -> dict[str, int]:
        """As in `data` of result.json."""
        return {"bad_steps": self.count, "zeroed_gradients": self.zeroed_gradients}
