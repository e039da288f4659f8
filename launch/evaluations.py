"""Which evaluations on `valid` were best, by the recipe's monitor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..datasets.schema import InputError
from ..mmoe.heads import Task
from .sections import BETTER_WHEN_LARGE, TrainSection


class Evaluations:
    """Of one run, from its beginning on."""

    def __init__(self, section: TrainSection, tasks: Sequence[Task]) -> None:
        self.task, self.metric = section.watched(tasks)
        self.values: list[tuple[int, float | None]] = []
        """Step and value of each; None where the metric is undefined."""
        self.best: dict[str, Any] | None = None
        """Metrics of the best one, as in result.json."""

    def value(self, metrics: Mapping[str, Any]) -> float | None:
        return metrics["tasks"][self.task][self.metric]

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        self.values.append((step, self.value(metrics)))
        if self.best_steps(1) == [step]:
            self.best = metrics

    def best_steps(self, count: int) -> list[int]:
        """The steps of the best `count`, the best one first; of equal ones the earlier."""
        sign = 1.0 if self.metric in BETTER_WHEN_LARGE else -1.0
        ranked = sorted(self.values, key=lambda pair: (pair[1] is None, -sign * (pair[1] or 0.0), pair[0]))
        return [step for step, _ in ranked[:count]]

    @property
    def since_best(self) -> int:
        """Evaluations after the best one."""
        steps = [step for step, _ in self.values]
        return len(steps) - 1 - steps.index(self.best_steps(1)[0]) if steps else 0

    def state(self) -> dict[str, Any]:
        return {"monitor": f"{self.task}.{self.metric}", "values": list(self.values), "best": self.best}

    def load(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            InputError: they were compared by another metric.
        """
        now = f"{self.task}.{self.metric}"
        if state["values"] and state["monitor"] != now:
            raise InputError(f"'train.monitor' was {state['monitor']}, and is {now} now; set it back, or start another run")
        self.values, self.best = [(step, value) for step, value in state["values"]], state["best"]
