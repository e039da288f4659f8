"""Which evaluations are best, and how many there were since."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.datasets.schema import InputError
from triptych.launch.evaluations import Evaluations
from triptych.launch.sections import TrainSection
from triptych.mmoe.heads import Task

TASKS = (Task(name="ctr", kind="binary", label="click"), Task(name="dwell", kind="duration", label="ms"))
VALUES = st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3]) | st.floats(0, 1), max_size=12)


def metrics(task: str, metric: str, value: float | None, step: int) -> dict[str, Any]:
    return {"step": step, "tasks": {task: {metric: value}}}


def evaluations(values: list[float | None], monitor: str) -> Evaluations:
    found = Evaluations(TrainSection(monitor=monitor), TASKS)
    for number, value in enumerate(values):
        found.add(10 * number, metrics(*monitor.split("."), value, 10 * number))
    return found


@given(VALUES, st.sampled_from(["ctr.auc", "ctr.ne", "dwell.mae"]), st.integers(1, 14))
def test_the_best_are_those_of_a_plain_loop(values: list[float | None], monitor: str, count: int) -> None:
    found = evaluations(values, monitor)
    left, expected = {10 * i: value for i, value in enumerate(values)}, []
    while left and len(expected) < count:
        best = next(iter(left))
        for step, value in left.items():
            other = left[best]
            if value is not None and (other is None or (value > other if monitor == "ctr.auc" else value < other)):
                best = step
        expected.append(best)
        del left[best]
    assert found.best_steps(count) == expected
    if values:
        assert found.best is not None and found.best["step"] == found.best_steps(1)[0]
        assert found.since_best == len(values) - 1 - found.best["step"] // 10
    else:
        assert found.best is None and found.since_best == 0


@given(VALUES, VALUES)
def test_what_was_saved_goes_on(before: list[float | None], after: list[float | None]) -> None:
    whole, first = evaluations(before + after, "ctr.auc"), evaluations(before, "ctr.auc")
    resumed = Evaluations(TrainSection(monitor="ctr.auc"), TASKS)
    resumed.load(json.loads(json.dumps(first.state())))
    for number, value in enumerate(after, len(before)):
        resumed.add(10 * number, metrics("ctr", "auc", value, 10 * number))
    assert (resumed.best_steps(5), resumed.best, resumed.since_best) == (whole.best_steps(5), whole.best, whole.since_best)


def test_values_of_two_metrics_are_never_compared() -> None:
    first = evaluations([0.6], "ctr.auc")
    with pytest.raises(InputError, match=r"'train.monitor' was ctr.auc, and is ctr.ne now"):
        Evaluations(TrainSection(monitor="ctr.ne"), TASKS).load(first.state())
    Evaluations(TrainSection(monitor="ctr.ne"), TASKS).load(evaluations([], "ctr.auc").state())
