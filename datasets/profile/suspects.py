"""Columns that may not or need not be features: leaks of a label first, then what has nothing to tell. Each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import names
from .columns import LARGEST, ColumnProfile
from .measures import categories, is_relabelled, out_of_fold_auc, quantile_bins, rank_auc, rank_correlation
from .profile import Profile
from .roles import Roles, Sample, is_binary, is_moment, looks_like_duration, looks_like_label

Auc = Callable[[np.ndarray, np.ndarray], float]
MOST_AUC = 0.95
"""A column that alone reaches more is taken for a leak."""
_SCREEN_ROWS, _SCREEN_MARGIN = 20_000, 0.1
"""AUCs are taken over fewer rows first, and over all where they come near, and not at all for a label that is hardly ever 0, or 1."""
_LEAST_OF_A_CLASS, _ENOUGH_OF_A_CLASS = 30, 500
_MANY = 200
_FEWEST_SET, _BY_CHANCE = 50, math.log(1e-6)


@dataclass(frozen=True)
class Suspect:
    """A column left out of the features."""

    column: str
    kind: str
    """leak, copy, outcome, constant, unique, time, unreadable."""
    reason: str
    """In one line."""


def find_suspects(profile: Profile, roles: Roles, sample: Sample) -> list[Suspect]:
    """At most one for each column, in the columns' order. Labels, durations, user, item and time are not features and not looked at, except
    for labels that are copies of another label."""
    found, screen_K = [], _screen_rows(roles, sample)
    for name, column in profile.columns.items():
        if name in (roles.user, roles.item, roles.time, *roles.durations):
            continue
        tests = _label_tests(column, roles, sample) if name in roles.labels else _tests(column, roles, sample, screen_K)
        suspect = next(tests, None)
        if suspect is not None:
            found.append(suspect)
    return found


def _label_tests(column: ColumnProfile, roles: Roles, sample: Sample) -> Iterator[Suspect]:
    for other in roles.labels[: roles.labels.index(column.name)]:
        if (sample.codes[column.name] == sample.codes[other]).all():
            yield Suspect(column.name, "copy", f"is a copy of the label {other}")


def _tests(column: ColumnProfile, roles: Roles, sample: Sample, screen_K: np.ndarray) -> Iterator[Suspect]:
    """What speaks against a column, the gravest first."""
    if roles.sides.get(column.name) == "context":
        yield from _outcome_with_nan(column)
    yield from _unusable(column)
    yield from _copies(column, roles, sample)
    yield from _predicts(column, roles, sample, screen_K)
    if roles.sides[column.name] == "context":
        yield from _outcome(column, roles, sample)
        yield from _moments(column, roles, sample)
        yield from _unique(column)


def unreadable(column: ColumnProfile) -> str | None:
    """Why no feature can read a column; None if one can."""
    if not column.name:
        return "has no name: give it one"
    if column.element in ("other", "list") or (column.is_list and column.element in ("moment", "boolean")):
        return f"is {column.type}, which no feature reads"
    if column.nan or column.infinite:
        return f"holds {column.nan} NaN and {column.infinite} infinite values: make them nulls"
    if column.element == "number" and not (column.min is None or column.max is None or -LARGEST <= column.min <= column.max <= LARGEST):
        return f"holds numbers from {column.min:g} to {column.max:g}, beyond what a float32 holds"
    if column.null_elements:
        return f"has {column.null_elements} nulls within its lists"
    if column.type in ("uint64", "list<element: uint64>") and column.min is not None and column.min < 0:
        return "holds numbers above 2^63"
    if column.is_list and column.element == "number" and (column.length_min != column.length_max or column.nulls or not column.length_max):
        return f"holds lists of {column.length_min} to {column.length_max} numbers and {column.nulls} nulls: a vector has one length"
    return None


def _outcome_with_nan(column: ColumnProfile) -> Iterator[Suspect]:
    """What would be a task but for NaN. A null says that nothing is known of the row; NaN may be a computation gone wrong."""
    kind = "label" if looks_like_label(column) else "duration" if looks_like_duration(column) else None
    if kind is not None and column.nan and not column.infinite:
        yield Suspect(column.name, "unreadable", f"looks like a {kind}, but holds {column.nan} NaN: make them nulls, which a task can mask")


def _unusable(column: ColumnProfile) -> Iterator[Suspect]:
    reason = unreadable(column)
    if column.element == "null" or column.nulls == column.rows or (column.is_list and not column.values):
        yield Suspect(column.name, "constant", "is empty in all rows")
    elif reason is not None:
        yield Suspect(column.name, "unreadable", reason)
    elif column.is_constant:
        yield Suspect(column.name, "constant", "has one value in all rows")
    elif names.is_weight(column.name) and column.kind == "number" and column.min is not None and column.min >= 0:
        yield Suspect(
            column.name, "outcome", f'looks like the weight of the row: for losses and metrics, weight = "{column.name}" in [data]'
        )


def _copies(column: ColumnProfile, roles: Roles, sample: Sample) -> Iterator[Suspect]:
    if column.is_list or column.distinct + (column.nulls > 0) not in (2, 3):  # a label may have nulls
        return
    for label in roles.labels:
        if is_relabelled(sample.codes[column.name], sample.codes[label]):
            yield Suspect(column.name, "copy", f"is a copy of the label {label}")


def _screen_rows(roles: Roles, sample: Sample) -> np.ndarray:
    """Rows on which an AUC of any label is already about right: the first ones, and enough of both classes of each label."""
    chosen = [np.arange(min(_SCREEN_ROWS, sample.rows))]
    for label in roles.labels:
        chosen += [np.flatnonzero(sample.numbers[label] == value)[:_ENOUGH_OF_A_CLASS] for value in (0, 1)]
    return np.unique(np.concatenate(chosen))


def _views(column: ColumnProfile, sample: Sample, rows: np.ndarray | slice) -> list[tuple[Auc, np.ndarray]]:
    """The ways a column may tell a label: as a category, by its rank, in bins. Each a measure and the categories it takes."""
    codes, numbers = sample.codes[column.name][rows], sample.numbers[column.name][rows]
    category_N = categories(numbers if column.kind == "number" else codes)
    views: list[tuple[Auc, np.ndarray]] = [(out_of_fold_auc, category_N)]
    if column.is_numeric:
        views.append((rank_auc, category_N))
        if column.distinct > _MANY:
            views.append((out_of_fold_auc, quantile_bins(numbers)))
    return views


def _best_auc(views: list[tuple[Auc, np.ndarray]], label_N: np.ndarray) -> float:
    """Over the rows that have the label."""
    known_N = ~np.isnan(label_N)
    return max(auc(category_N[known_N], label_N[known_N]) for auc, category_N in views)


def _predicts(column: ColumnProfile, roles: Roles, sample: Sample, screen_K: np.ndarray) -> Iterator[Suspect]:
    views, screen = None, _views(column, sample, screen_K)
    for label in roles.labels:
        label_N = sample.numbers[label]
        if min((label_N == 0).sum(), (label_N == 1).sum()) < _LEAST_OF_A_CLASS:
            continue
        if _best_auc(screen, label_N[screen_K]) < MOST_AUC - _SCREEN_MARGIN:
            continue
        views = views or _views(column, sample, slice(None))
        best = _best_auc(views, label_N)
        if best > MOST_AUC:
            yield Suspect(column.name, "leak", f"alone predicts {label} with AUC {best:.3f}")
    for duration in roles.durations if column.is_numeric else ():
        rho = rank_correlation(sample.numbers[column.name][:_SCREEN_ROWS], sample.numbers[duration][:_SCREEN_ROWS])
        if abs(rho) > MOST_AUC:
            yield Suspect(column.name, "leak", f"orders the rows like {duration} (rank correlation {rho:.3f})")


def _outcome(column: ColumnProfile, roles: Roles, sample: Sample) -> Iterator[Suspect]:
    """What was known only afterwards, by its name or by where it is set."""
    # A list of ids is what a user did before, whatever its name.
    if column.name != roles.scenario and not column.is_list:
        words = names.outcome_words(column.name, roles.outcomes)
        if words:
            yield Suspect(column.name, "outcome", f"sounds like an outcome ({', '.join(sorted(words))}) and changes from row to row")
    numbers = sample.numbers[column.name]
    is_set = ~np.isnan(numbers) & ((numbers != 0) if column.is_numeric else True)
    for label in roles.labels:
        known = ~np.isnan(sample.numbers[label])
        label_K, set_K = sample.numbers[label][known] == 1, is_set[known]
        rate, count = float(label_K.mean()) if len(label_K) else 0.0, int(set_K.sum())
        if 0 < rate < 1 and _FEWEST_SET <= count < len(set_K) and count * math.log(rate) < _BY_CHANCE and label_K[set_K].all():
            yield Suspect(column.name, "outcome", f"is set only where {label} is 1 ({count} of {len(set_K)} sampled rows)")


def _unique(column: ColumnProfile) -> Iterator[Suspect]:
    if column.kind not in ("integer", "text") or column.distinct * 2 <= column.values:
        return
    rows = column.values / column.distinct
    is_amount = column.kind == "integer" and not names.is_id(column.name) and rows > 1.02
    if rows < 1.02:
        yield Suspect(column.name, "unique", "is another one in (nearly) each row: nothing can be learned of it")
    elif not is_amount:
        yield Suspect(column.name, "unique", f"has {rows:.1f} rows a value: too few to learn from")


def _moments(column: ColumnProfile, roles: Roles, sample: Sample) -> Iterator[Suspect]:
    """Values of later rows were never trained."""
    if is_moment(column):
        yield Suspect(column.name, "time", "is a moment; later ones were never seen in training")
    elif roles.time is not None and column.is_numeric and not is_binary(column):
        rho = rank_correlation(sample.numbers[column.name][:_SCREEN_ROWS], sample.numbers[roles.time][:_SCREEN_ROWS])
        if rho > 0.98:
            yield Suspect(column.name, "time", f"moves with {roles.time}; later values were never seen in training")
