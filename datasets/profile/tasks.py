"""Which labels become tasks, in which order, and under which condition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import names
from .columns import ColumnProfile
from .measures import correlation
from .profile import Profile
from .roles import Roles, Sample

MOST_TASKS = 6
_MOST_DURATIONS = 2
_LEAST_RATE, _LEAST_ONES = 0.002, 100
_NESTED = 0.99
_NEVER = 0.001


@dataclass(frozen=True)
class TaskGuess:
    """A task, as the recipe has it, and what spoke for it."""

    label: str
    kind: str
    why: str
    given: str | None = None
    scale: float | None = None
    cap: float | None = None
    nulls: str | None = None
    """mask, where the label has nulls."""


def guess_tasks(profile: Profile, roles: Roles, sample: Sample, dropped: set[str]) -> tuple[list[TaskGuess], list[str]]:
    """Tasks, the click first, durations last; and one line for each outcome that is none.

    Args:
        dropped: labels that may not be tasks.
    """
    labels = [label for label in roles.labels if label not in dropped]
    click = next((label for label in labels if names.is_click(label)), None)
    durations = roles.durations[:_MOST_DURATIONS]
    left = [f"{name}: a further duration" for name in roles.durations[_MOST_DURATIONS:]]
    first = click or next(iter(labels), None)
    # Python's sort is stable: labels of one rate stay in the columns' order.
    ranked = sorted((label for label in labels if label != first), key=lambda label: -_rate(profile.columns[label]))
    tasks = [_binary(profile, first, click, sample)] if first else []
    for label in ranked:
        rate, ones = _rate(profile.columns[label]), _ones(profile.columns[label])
        if rate < _LEAST_RATE or ones < _LEAST_ONES:
            left.append(f"{label}: 1 in {rate:.3%} of the rows ({round(ones)})")
        elif len(tasks) + len(durations) == MOST_TASKS:
            left.append(f"{label}: 1 in {rate:.1%} of the rows")
        else:
            tasks.append(_binary(profile, label, click, sample))
    return tasks + [_duration(profile.columns[name], click, sample) for name in durations], left


def _rate(column: ColumnProfile) -> float:
    return column.mean or 0.0


def _ones(column: ColumnProfile) -> float:
    return _rate(column) * column.values


def _binary(profile: Profile, label: str, click: str | None, sample: Sample) -> TaskGuess:
    of = "the rows that have it" if profile.columns[label].nulls else "the rows"
    why = f"1 in {_rate(profile.columns[label]):.1%} of {of}"
    if click is None or label == click:
        return TaskGuess(label, "binary", why)
    with_click = sample.numbers[click][(sample.numbers[label] == 1) & ~np.isnan(sample.numbers[click])]
    share = float(with_click.mean()) if len(with_click) else 0.0
    fewer = _ones(profile.columns[label]) < _ones(profile.columns[click])
    if fewer and share >= _NESTED:
        return TaskGuess(label, "binary", f"{why}, and in {share:.1%} of these {click} is 1", given=click)
    return TaskGuess(label, "binary", f"{why}; {click} is 1 in {share:.0%} of these, too few for given")


def _duration(column: ColumnProfile, click: str | None, sample: Sample) -> TaskGuess:
    number_N = sample.numbers[column.name]
    number_N = number_N[~np.isnan(number_N)]
    positive = number_N[number_N > 0]
    unit = names.seconds_in_unit(column.name)
    how = "by its name" if unit is not None else "by its size"
    if unit is None:
        unit = 0.001 if len(positive) and float(np.median(positive)) > 1000 else 1.0
    cap = max(float(f"{np.quantile(number_N, 0.999) * unit:.2g}"), 1.0) if len(number_N) else 1.0
    given, why = None, f"in units of {unit:g} s {how}; cap: 99.9 % of the rows are below"
    if click is not None:
        unclicked = sample.numbers[click] == 0
        # Nulls are not above 0: a duration that only a click sets may be null without one.
        share = float((sample.numbers[column.name][unclicked] > 0).mean()) if unclicked.any() else 1.0
        given = click if share <= _NEVER else None
        why += (
            f"; above 0 in {share:.0%} of the rows without {click}"
            if given is None
            else f"; 0{' or null' if column.nulls else ''} wherever {click} is 0"
        )
    return TaskGuess(column.name, "duration", why, given, unit, cap if math.isfinite(cap) else None)


def correlations(roles: Roles, sample: Sample) -> dict[tuple[str, str], float]:
    """Pearson's correlation of each two labels and durations, over the sampled rows."""
    found = {}
    for i, a in enumerate(roles.outcomes):
        for b in roles.outcomes[i + 1 :]:
            known = ~(np.isnan(sample.numbers[a]) | np.isnan(sample.numbers[b]))
            found[a, b] = correlation(sample.numbers[a][known], sample.numbers[b][known])
    return found
