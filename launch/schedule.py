"""How learning rates change over a run: a factor on all of them, those of tables included."""

from __future__ import annotations

import math

from .sections import TrainSection


def lr_factor(section: TrainSection, step: int, total: int) -> float:
    """The factor on the learning rates of the step that follows `step` steps of `total`.

    Warm-up: linear from 1 / warmup_steps to 1. Then `constant`, or from 1 down to `final_lr` at the last step, linearly or as half a
    cosine (Loshchilov and Hutter, ICLR 2017).
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return 1.0
    share = (step - section.warmup_steps) / max(1, total - 1 - section.warmup_steps)
    left = 1.0 - share if section.schedule == "linear" else (1.0 + math.cos(math.pi * min(share, 1.0))) / 2
    return section.final_lr + (1.0 - section.final_lr) * max(left, 0.0)
