"""Learning-rate schedules: closed forms, and the rates that every optimizer gets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.launch.schedule import lr_factor
from triptych.launch.sections import TrainSection


def factors(total: int, **keys: object) -> list[float]:
    return [lr_factor(TrainSection(**keys), step, total) for step in range(total)]


def test_constant_without_warm_up_is_one() -> None:
    assert factors(5) == [1.0] * 5


def test_warm_up_rises_linearly_to_one_and_stays() -> None:
    assert factors(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_falls_to_final_lr_at_the_last_step() -> None:
    assert factors(7, schedule="linear", warmup_steps=2, final_lr=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_a_cosine() -> None:
    expected = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    assert factors(11, schedule="cosine") == pytest.approx(expected, abs=1e-12)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 20),
    st.floats(0, 1),
    st.integers(1, 40),
)
def test_stays_between_zero_and_one_and_falls_after_the_warm_up(schedule: str, warmup: int, final: float, total: int) -> None:
    final = 0.0 if schedule == "constant" else final
    found = factors(total, schedule=schedule, warmup_steps=warmup, final_lr=final)
    assert all(0 <= factor <= 1 for factor in found)
    after = found[warmup:]
    assert after == sorted(after, reverse=True)
    if after and schedule != "constant" and len(after) > 1:
        assert after[0] == 1 and after[-1] == pytest.approx(final)
