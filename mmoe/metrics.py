"""What a split's predictions are worth: exact, weighted metrics of binary and duration tasks, and the report that composes them.

Pure functions on numpy arrays that already hold every rank's rows; they compute in float64. A metric is a plain float, or None where it is
undefined or exceeds a float64. Weights are >= 0 and finite; a row of weight zero counts for nothing, whatever else it holds.
Shape suffixes: N rows, R runs of equal values among sorted rows, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def auc(prediction_N, label_N, weight_N=None) -> float | None:
    """The chance that a positive row is predicted above a negative one, rows drawn by weight, ties counting half (Mann-Whitney U).

    Args: predictions in any unit, labels 0 or 1, optional weights, each of shape (N,).
    Returns None when one class has no weight. Raises ValueError for predictions that are not finite and labels other than 0 and 1.
    """
    return grouped_auc(prediction_N, label_N, np.zeros(len(label_N), np.int64), weight_N)


def grouped_auc(prediction_N, label_N, group_N, weight_N=None) -> float | None:
    """GAUC: the mean of the groups' AUCs, each counting by its total weight (impressions), over groups that hold both classes.

    Source: Zhou et al., Deep Interest Network, KDD 2018. Args, errors: as `auc`, and integer groups of shape (N,).
    Returns None when no group holds both classes.
    """
    prediction_N, label_N, weight_N, group_N = _counted_rows(prediction_N, label_N, weight_N, group_N, binary=True)
    auc_G, weight_G = _group_aucs(prediction_N, label_N, group_N, weight_N)
    return _quotient(np.sum(weight_G * auc_G), np.sum(weight_G))


def log_loss(probability_N, label_N, weight_N=None) -> float | None:
    """Mean of -ln(probability of the label that came), in nats; that probability is clipped from below at float64's eps, 2.2e-16.

    Args: probabilities from 0 to 1, labels 0 or 1, optional weights, each of shape (N,). Returns None without rows.
    Raises ValueError for probabilities outside 0 to 1 and labels other than 0 and 1.
    """
    probability_N, label_N, weight_N, _ = _counted_rows(probability_N, label_N, weight_N, binary=True)
    _refuse((probability_N < 0) | (probability_N > 1), "probabilities lie outside 0 to 1")
    of_label_N = np.maximum(np.where(label_N == 1, probability_N, 1 - probability_N), np.finfo(np.float64).eps)
    return _quotient(np.sum(weight_N * -np.log(of_label_N)), np.sum(weight_N))


def normalized_entropy(probability_N, label_N, weight_N=None) -> float | None:
    """Log loss divided by the entropy of the label rate: 1 is as good as predicting the rate everywhere, 0 is perfect.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014. Args, errors: as `log_loss`.
    Returns None when the weighted label rate is 0 or 1.
    """
    probability_N, label_N, weight_N, _ = _counted_rows(probability_N, label_N, weight_N, binary=True)
    rate = _quotient(np.sum(weight_N * label_N), np.sum(weight_N))
    loss = log_loss(probability_N, label_N, weight_N)
    if rate is None or loss is None or not 0 < rate < 1:
        return None
    return _quotient(loss, -rate * np.log(rate) - (1 - rate) * np.log1p(-rate))


def calibration(prediction_N, label_N, weight_N=None) -> float | None:
    """Sum of predictions divided by sum of labels, both weighted: 1 is unbiased, above 1 predicts too much.

    Args: predictions and labels in one unit, optional weights, each of shape (N,). Returns None when the labels do not sum to more than 0.
    """
    prediction_N, label_N, weight_N, _ = _counted_rows(prediction_N, label_N, weight_N)
    return _quotient(np.sum(weight_N * prediction_N), np.sum(weight_N * label_N))


def mae(prediction_N, label_N, weight_N=None) -> float | None:
    """Weighted mean absolute error, in the labels' unit. Args: as `calibration`. Returns None without rows."""
    prediction_N, label_N, weight_N, _ = _counted_rows(prediction_N, label_N, weight_N)
    return _quotient(np.sum(weight_N * np.abs(prediction_N - label_N)), np.sum(weight_N))


def rmse(prediction_N, label_N, weight_N=None) -> float | None:
    """Root of the weighted mean squared error, in the labels' unit. Args: as `calibration`. Returns None without rows."""
    prediction_N, label_N, weight_N, _ = _counted_rows(prediction_N, label_N, weight_N)
    mean_square = _quotient(np.sum(weight_N * (prediction_N - label_N) ** 2), np.sum(weight_N))
    return None if mean_square is None else float(np.sqrt(mean_square))


def xauc(prediction_N, label_N) -> float | None:
    """The share of pairs with different labels that the predictions order like the labels, tied predictions counting half.

    Source: Zhan et al., Deconfounding Duration Bias in Watch-time Prediction, KDD 2022. Counted exactly, in integers, in O(N log N).
    Args: predictions and labels in any units, each of shape (N,). Returns None when all labels are equal.
    """
    prediction_N, label_N, _, _ = _counted_rows(prediction_N, label_N)
    by_label_N = np.lexsort((prediction_N, label_N))
    prediction_N, label_N = prediction_N[by_label_N], label_N[by_label_N]
    by_prediction_N = np.argsort(prediction_N, kind="stable")
    rank_N = np.argsort(by_prediction_N)
    different_pairs = len(label_N) * (len(label_N) - 1) // 2 - _num_equal_pairs(label_N)
    tied_pairs = _num_equal_pairs(prediction_N[by_prediction_N]) - _num_equal_pairs(label_N, prediction_N)
    # Rows of one label are sorted by prediction and ties keep their order, so every inversion left is a pair ordered against its labels.
    return _quotient(2 * different_pairs - 2 * _num_inversions(rank_N) - tied_pairs, 2 * different_pairs)


def binary_metrics(probability_N, label_N, group_N=None, weight_N=None) -> dict[str, float | int | None]:
    """{"rows", "positives", "auc", "gauc" if there are groups, "ne", "logloss", "calibration"}; the first two are unweighted counts.

    Args, errors: as `log_loss` and `grouped_auc`.
    """
    probability_N, label_N, weight_N, group_N = _counted_rows(probability_N, label_N, weight_N, group_N, binary=True)
    rows = probability_N, label_N, weight_N
    metrics = {"rows": len(label_N), "positives": int(np.sum(label_N)), "auc": auc(*rows)}
    if group_N is not None:
        metrics["gauc"] = grouped_auc(probability_N, label_N, group_N, weight_N)
    return metrics | {"ne": normalized_entropy(*rows), "logloss": log_loss(*rows), "calibration": calibration(*rows)}


def duration_metrics(prediction_N, label_N, weight_N=None) -> dict[str, float | int | None]:
    """{"rows", "mae", "rmse", "xauc", "calibration"}; rows and xauc count every row of positive weight once. Args: as `calibration`."""
    *rows, _ = _counted_rows(prediction_N, label_N, weight_N)
    metrics = {"rows": len(rows[0]), "mae": mae(*rows), "rmse": rmse(*rows)}
    return metrics | {"xauc": xauc(*rows[:2]), "calibration": calibration(*rows)}


@dataclass(frozen=True)
class TaskColumns:
    """One task's predictions and labels, each of shape (N,), in one unit. Its kind is "binary" or "duration"."""

    name: str
    kind: str
    given: str | None
    """The binary task whose label is 1 where this task's label means something; elsewhere this label is never read."""
    prediction_N: np.ndarray
    """Conditional on `given`: a probability if binary, else a duration."""
    label_N: np.ndarray
    null_N: np.ndarray | None = None  # rows whose label is missing and counts for nothing


def report(tasks: Sequence[TaskColumns], group_N=None, scenario_N=None, weight_N=None) -> dict[str, dict]:
    """The metrics of one split, as `result.json` holds them.

    A task with `given` counts the rows on which the labels of all its ancestors are 1. Its `joint` counts every row: its prediction times
    its ancestors' predictions, against its label times its ancestors' labels. Rows where a label that would decide is null do not count.

    Args: tasks of N rows each; optional integer groups, scenarios (integers, strings or objects) and weights, each of shape (N,).
    Returns {"tasks": {task: {"kind", metrics; with given: "given", "joint"}}} and, with scenarios, the scenario of most rows first,
    {"scenarios": {str(scenario): {task: metrics}}}.
    Raises ValueError, in one line that names the task, for values no metric can take and for a `given` that is no binary task.
    """
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise ValueError(f"task names repeat: {', '.join(task.name for task in tasks)}")
    columns = [column for task in tasks for column in (task.prediction_N, task.label_N)]
    all_rows = np.arange(_common_length(*columns, group_N, scenario_N, weight_N))
    result: dict[str, dict] = {"tasks": {}}
    holds_N = {}
    for task in tasks:
        ancestors = _ancestors(task, by_name)
        holds_N[task.name] = np.logical_and.reduce([all_rows >= 0, *(np.asarray(given.label_N) == 1 for given in ancestors)])
        entry: dict[str, object] = {"kind": task.kind, "given": task.given} if ancestors else {"kind": task.kind}
        joint = _joint(task, ancestors, holds_N[task.name]) if ancestors else None
        known_N = ~np.logical_or.reduce([all_rows < 0, *(part.null_N for part in (task, *ancestors) if part.null_N is not None)])
        holds_N[task.name] &= known_N
        entry |= _task_metrics(task, all_rows[holds_N[task.name]], group_N, weight_N)
        if joint:
            entry["joint"] = _task_metrics(joint, all_rows[known_N], group_N, weight_N)
        result["tasks"][task.name] = entry
    if scenario_N is not None:
        result["scenarios"] = {
            scenario: {task.name: _task_metrics(task, rows[holds_N[task.name][rows]], group_N, weight_N) for task in tasks}
            for scenario, rows in _rows_by_scenario(np.asarray(scenario_N), weight_N)
        }
    return result


def _ancestors(task: TaskColumns, by_name: dict[str, TaskColumns]) -> list[TaskColumns]:
    """The tasks whose labels must be 1 for this task's label to mean something, nearest first."""
    ancestors, child = [], task
    while child.given is not None:
        if child.given not in by_name or by_name[child.given].kind != "binary":
            allowed = ", ".join(name for name, other in by_name.items() if other.kind == "binary")
            raise ValueError(f"task {child.name}: given {child.given!r} is no binary task; binary tasks: {allowed or 'none'}")
        child = by_name[child.given]
        ancestors.append(child)
        if len(ancestors) >= len(by_name):
            raise ValueError(f"task {task.name}: its chain of given runs in a circle")
    return ancestors


def _joint(task: TaskColumns, ancestors: list[TaskColumns], holds_N) -> TaskColumns:
    prediction_N = np.prod([np.asarray(each.prediction_N, np.float64) for each in (task, *ancestors)], axis=0)
    # Not a product: where the condition does not hold the label means nothing and may be NaN.
    label_N = np.where(holds_N, task.label_N, 0)
    return TaskColumns(f"{task.name} (joint)", task.kind, None, prediction_N, label_N)


def _task_metrics(task: TaskColumns, rows, group_N, weight_N) -> dict[str, float | int | None]:
    """The metrics of one task on the rows of these indices; errors name the task."""
    columns = task.prediction_N, task.label_N, group_N, weight_N
    prediction_N, label_N, group_N, weight_N = (None if column is None else np.asarray(column)[rows] for column in columns)
    try:
        if task.kind == "binary":
            return binary_metrics(prediction_N, label_N, group_N, weight_N)
        if task.kind == "duration":
            return duration_metrics(prediction_N, label_N, weight_N)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from None
    raise ValueError(f"task {task.name}: no metrics for kind {task.kind!r}; kinds: binary, duration")


def _rows_by_scenario(scenario_N: np.ndarray, weight_N) -> list[tuple[str, np.ndarray]]:
    """(name, row indices) of each scenario that has rows of positive weight, the one with the most first."""
    counted_rows = np.arange(len(scenario_N)) if weight_N is None else np.flatnonzero(np.asarray(weight_N) > 0)
    # Objects of several types, None among them, cannot be sorted; their names can.
    names_N = scenario_N[counted_rows].astype(str) if scenario_N.dtype == object else scenario_N[counted_rows]
    names, scenario_of_row, counts = np.unique(names_N, return_inverse=True, return_counts=True)
    rows = np.split(counted_rows[np.argsort(scenario_of_row, kind="stable")], np.cumsum(counts)[:-1])
    return sorted(zip(map(str, names.tolist()), rows, strict=False), key=lambda scenario: -len(scenario[1]))


def _group_aucs(prediction_N, label_N, group_N, weight_N) -> tuple[np.ndarray, np.ndarray]:
    """AUC and total weight of every group that holds both classes, each of shape (G,)."""
    order_N = np.lexsort((prediction_N, group_N))
    prediction_N, label_N, group_N, weight_N = (column[order_N] for column in (prediction_N, label_N, group_N, weight_N))
    run_starts_R = _run_starts(group_N, prediction_N)
    positive_R = np.add.reduceat(weight_N * label_N, run_starts_R)
    negative_R = np.add.reduceat(weight_N * (1 - label_N), run_starts_R)
    first_run_G = _run_starts(group_N[run_starts_R])
    group_of_run_R = np.repeat(np.arange(len(first_run_G)), np.diff(first_run_G, append=len(run_starts_R)))
    positive_G = np.add.reduceat(positive_R, first_run_G)
    negative_G = np.add.reduceat(negative_R, first_run_G)
    # One running sum serves all groups, and heavy ones would drown light ones: each group's negatives are scaled to a total of 0.5 to 1.
    # The scale is a power of two, which keeps every digit: counts stay exact.
    _, exponent_G = np.frexp(negative_G)
    scaled_R = np.ldexp(negative_R, -exponent_G[group_of_run_R])
    before_R = np.cumsum(scaled_R) - scaled_R
    before_R -= before_R[first_run_G][group_of_run_R]
    wins_G = np.add.reduceat(positive_R * (before_R + scaled_R / 2), first_run_G)
    both_G = (positive_G > 0) & (negative_G > 0)
    pairs_G = positive_G[both_G] * np.ldexp(negative_G, -exponent_G)[both_G]
    # Rounding can lift a perfect weighted order just above 1.
    return np.minimum(wins_G[both_G] / pairs_G, 1.0), (positive_G + negative_G)[both_G]


def _num_inversions(permutation_N: np.ndarray) -> int:
    """Number of pairs i < j with permutation[i] > permutation[j], for a permutation of 0 .. N - 1.

    Sorts by one bit at a time, the highest first. A block holds consecutive values, each once, so it splits into equal halves, and a value
    of the lower half moves left by one place for each value of the upper half that stood before it.
    """
    num_bits = max(len(permutation_N) - 1, 0).bit_length()
    positions = np.arange(1 << num_bits)
    values = np.concatenate([permutation_N, positions[len(permutation_N) :]])
    inversions = 0
    for half in (1 << bit for bit in reversed(range(num_bits))):
        is_upper = (values & half) != 0
        lower_from, lower_to = positions[~is_upper], positions.reshape(-1, 2, half)[:, 0].ravel()
        inversions += int(np.sum(lower_from - lower_to))
        values = np.stack([values[~is_upper].reshape(-1, half), values[is_upper].reshape(-1, half)], axis=1).ravel()
    return inversions


def _run_starts(*sorted_columns: np.ndarray) -> np.ndarray:
    """Indices of the rows that differ from the row before in any column; the first row is one."""
    is_start = np.ones(len(sorted_columns[0]), bool)
    is_start[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in sorted_columns])
    return np.flatnonzero(is_start)


def _num_equal_pairs(*sorted_columns: np.ndarray) -> int:
    """Number of pairs of rows that are equal in all columns."""
    lengths = np.diff(_run_starts(*sorted_columns), append=len(sorted_columns[0]))
    return int(np.sum(lengths * (lengths - 1) // 2))


def _counted_rows(prediction_N, label_N, weight_N=None, group_N=None, binary=False) -> tuple:
    """Predictions, labels and weights as float64 and groups, without the rows of weight zero; refuses what no metric can take."""
    num_rows = _common_length(prediction_N, label_N, weight_N, group_N)
    weight_N = np.ones(num_rows) if weight_N is None else np.asarray(weight_N, np.float64)
    _refuse(~((weight_N >= 0) & np.isfinite(weight_N)), "weights are negative or not finite")
    counted = slice(None) if weight_N.all() else weight_N > 0
    prediction_N, label_N = np.asarray(prediction_N, np.float64)[counted], np.asarray(label_N, np.float64)[counted]
    if group_N is not None:
        group_N = np.asarray(group_N)[counted]
        if len(group_N) and group_N.dtype.kind not in "iu":
            raise ValueError(f"groups are {group_N.dtype}, not integers")
    _refuse(~np.isfinite(prediction_N), "predictions are not finite")
    _refuse(~np.isfinite(label_N), "labels are not finite")
    _refuse(binary & (label_N != 0) & (label_N != 1), "labels are neither 0 nor 1")
    return prediction_N, label_N, weight_N[counted], group_N


def _common_length(*columns) -> int:
    """The length of all columns that are there; ValueError if they are not flat or differ in length."""
    shapes = {np.shape(column) for column in columns if column is not None}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"columns are not flat and of one length but of shapes {', '.join(map(str, sorted(shapes)))}")
    return shapes.pop()[0] if shapes else 0


def _refuse(bad_N: np.ndarray, what: str) -> None:
    if bad_N.any():
        raise ValueError(f"{np.count_nonzero(bad_N)} of {len(bad_N)} {what}")


def _quotient(numerator: float, denominator: float) -> float | None:
    """None when the denominator is not positive or the quotient is no finite float64."""
    quotient = float(numerator / denominator) if denominator > 0 else np.nan
    return quotient if np.isfinite(quotient) else None
