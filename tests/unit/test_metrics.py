"""The metrics equal their definitions, torchmetrics and closed forms."""

import json

import numpy as np
import pytest
import torch
import torchmetrics.functional as torchmetrics
import torchmetrics.functional.classification as torchmetrics_classification
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.mmoe import metrics
from triptych.mmoe.metrics import TaskColumns

many_examples = settings(deadline=None, max_examples=150)
few_values = st.integers(0, 6).map(lambda sixth: sixth / 6)  # few, so that ties are common
probabilities = st.one_of(few_values, st.floats(0, 1))
weights = st.one_of(st.integers(0, 3), st.floats(0, 10, allow_subnormal=False).map(lambda weight: round(weight, 6)))
groups = st.sampled_from([-(2**63), -1, 0, 1, 7, 2**63 - 1])
durations = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e4, allow_subnormal=False))


def columns(*strategies, min_size=0, max_size=40):
    """Lists of rows, as one numpy column per strategy."""
    rows = st.lists(st.tuples(*strategies), min_size=min_size, max_size=max_size)
    return rows.map(lambda rows: [np.array(column) for column in zip(*rows, strict=True)] or [np.empty(0, np.int64) for _ in strategies])


binary_rows = columns(probabilities, st.integers(0, 1), weights, groups)
duration_rows = columns(st.one_of(durations, st.floats(-10, 10)), durations, weights)


def naive_auc(prediction_N, label_N, weight_N=None):
    """The definition of AUC and XAUC over all ordered pairs: exact without weights, as every sum is then of halves."""
    weight_N = np.ones(len(label_N)) if weight_N is None else weight_N
    pair_NN = np.outer(weight_N, weight_N) * np.greater.outer(label_N, label_N)
    win_NN = np.greater.outer(prediction_N, prediction_N) + np.equal.outer(prediction_N, prediction_N) / 2
    return (pair_NN * win_NN).sum() / pair_NN.sum() if pair_NN.any() else None


def naive_grouped_auc(prediction_N, label_N, group_N, weight_N):
    aucs, group_weights = [], []
    for rows in (group_N == group for group in set(group_N.tolist())):
        group_auc = naive_auc(prediction_N[rows], label_N[rows], weight_N[rows])
        if group_auc is not None:
            aucs.append(group_auc)
            group_weights.append(weight_N[rows].sum())
    return np.average(aucs, weights=group_weights) if aucs else None


def close(value, rel=1e-9):
    if isinstance(value, dict):
        return {key: close(entry, rel) for key, entry in value.items()}
    return value if value is None else pytest.approx(value, rel=rel, abs=rel / 1000)


class TestAgainstNaiveDefinitions:
    @many_examples
    @given(binary_rows)
    def test_binary_metrics(self, rows):
        prediction_N, label_N, weight_N, group_N = rows
        assert metrics.auc(prediction_N, label_N) == close(naive_auc(prediction_N, label_N), rel=1e-15)
        assert metrics.auc(prediction_N, label_N, weight_N) == close(naive_auc(prediction_N, label_N, weight_N))
        unweighted = naive_grouped_auc(prediction_N, label_N, group_N, np.ones(len(label_N)))
        assert metrics.grouped_auc(prediction_N, label_N, group_N) == close(unweighted, rel=1e-15)
        weighted = naive_grouped_auc(prediction_N, label_N, group_N, weight_N)
        assert metrics.grouped_auc(prediction_N, label_N, group_N, weight_N) == close(weighted)

    @many_examples
    @given(duration_rows)
    def test_duration_metrics(self, rows):
        prediction_N, label_N, weight_N = rows
        assert metrics.xauc(prediction_N, label_N) == naive_auc(prediction_N, label_N)
        if weight_N.sum() > 0:
            error_N = prediction_N - label_N
            assert metrics.mae(prediction_N, label_N, weight_N) == close(np.average(abs(error_N), weights=weight_N))
            assert metrics.rmse(prediction_N, label_N, weight_N) == close(np.average(error_N**2, weights=weight_N) ** 0.5)
        if (weight_N * label_N).sum() > 0:
            with np.errstate(over="ignore"):
                ratio = (weight_N * prediction_N).sum() / (weight_N * label_N).sum()
            # Labels of 1e-306 seconds: a quotient that no float holds is no metric.
            assert metrics.calibration(prediction_N, label_N, weight_N) == close(ratio if np.isfinite(ratio) else None)

    @pytest.mark.parametrize("num_rows", [1, 2, 3, 255, 256, 257, 2500])
    def test_xauc_is_exact_around_powers_of_two(self, num_rows):
        random = np.random.default_rng(num_rows)
        label_N = np.round(random.exponential(3, num_rows), 1)
        prediction_N = np.round(label_N + random.normal(0, 3, num_rows), 1).astype(np.float32)
        assert metrics.xauc(prediction_N, label_N) == naive_auc(prediction_N, label_N)

    def test_a_million_rows(self):
        random = np.random.default_rng(0)
        prediction_N, label_N = random.random(1_000_000).astype(np.float32), random.random(1_000_000) < 0.1
        pairwise = metrics.xauc(prediction_N, label_N)
        assert pairwise == close(metrics.auc(prediction_N, label_N), rel=1e-14)
        assert pairwise == close(metrics.grouped_auc(prediction_N, label_N, np.full(1_000_000, 7)), rel=1e-14)
        label_N = random.permutation(1_000_000)
        # Two halves, each in its own order, with all of one half above all of the other.
        assert metrics.xauc((label_N + 500_000) % 1_000_000, label_N) == 1 - 500_000**2 / (1_000_000 * 999_999 / 2)

    def test_few_light_negatives_beside_heavy_groups(self):
        group_N, label_N = np.repeat([0, 1], 4), np.array([0, 1, 0, 1] * 2)
        prediction_N = np.array([0.1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.4, 0.3])
        weight_N = np.array([1e9 / 3, 1, 1e9 / 3, 1, 1e-9, 1e9, 3e-9, 1e9])
        expected = naive_grouped_auc(prediction_N, label_N, group_N, weight_N)
        assert metrics.grouped_auc(prediction_N, label_N, group_N, weight_N) == pytest.approx(expected, rel=1e-12)


class TestAgainstTorch:
    @many_examples
    @given(columns(probabilities, st.integers(0, 1), weights, min_size=1))
    def test_binary_metrics(self, rows):
        probability, label, weight = (torch.tensor(column) for column in rows)
        if 0 < label.sum() < len(label):
            expected = torchmetrics_classification.binary_auroc(probability, label, thresholds=None)
            assert metrics.auc(*rows[:2]) == pytest.approx(expected.item(), abs=1e-6)
        if weight.sum() > 0:
            clipped = probability.double().clamp(2**-52, 1 - 2**-52)
            losses = torch.nn.functional.binary_cross_entropy(clipped, label.double(), reduction="none")
            assert metrics.log_loss(*rows) == pytest.approx(((losses * weight).sum() / weight.sum()).item(), abs=1e-9)

    @many_examples
    @given(columns(durations, durations, min_size=2))
    def test_duration_metrics(self, rows):
        prediction, label = (torch.tensor(column, dtype=torch.float64) for column in rows)
        assert metrics.mae(*rows) == pytest.approx(torchmetrics.mean_absolute_error(prediction, label).item(), rel=1e-6)
        assert metrics.rmse(*rows) == pytest.approx(torchmetrics.mean_squared_error(prediction, label, squared=False).item(), rel=1e-6)

    @many_examples
    @given(st.integers(2, 40).flatmap(lambda size: st.tuples(st.permutations(range(size)), st.permutations(range(size)))))
    def test_xauc_without_ties_is_kendall_rescaled(self, orders):
        tau = torchmetrics.kendall_rank_corrcoef(*(torch.tensor(order, dtype=torch.float64) for order in orders), variant="a")
        assert metrics.xauc(*orders) == pytest.approx((tau.item() + 1) / 2, abs=1e-6)


class TestClosedForms:
    label_N = np.array([0, 1, 0, 1, 1, 0, 0, 0])
    group_N = np.array([1, 1, 2, 2, 3, 3, 4, 4])

    @pytest.mark.parametrize("prediction_N, expected", [(label_N, 1.0), (1 - label_N, 0.0), (np.full(8, 0.3), 0.5)])
    def test_perfect_inverted_and_constant_order(self, prediction_N, expected):
        assert metrics.auc(prediction_N, self.label_N) == expected
        assert metrics.grouped_auc(prediction_N, self.label_N, self.group_N) == expected
        assert metrics.xauc(prediction_N, self.label_N) == expected

    @pytest.mark.parametrize("seed", range(20))
    def test_rounding_lifts_no_auc_above_one(self, seed):
        random = np.random.default_rng(seed)
        weight_N, label_N = random.random(30), np.arange(30) % 2
        assert 1 - 1e-14 < metrics.auc(label_N + random.random(30) / 2, label_N, weight_N) <= 1

    def test_perfect_probabilities_lose_nothing_and_wrong_ones_a_finite_amount(self):
        assert str(metrics.log_loss(self.label_N, self.label_N)) == "0.0"
        assert metrics.normalized_entropy(self.label_N, self.label_N) == 0.0
        assert metrics.log_loss(1 - self.label_N, self.label_N) == pytest.approx(52 * np.log(2))

    @many_examples
    @given(columns(st.integers(0, 1), weights, min_size=2))
    def test_predicting_the_label_rate(self, rows):
        label_N, weight_N = rows
        if not 0 < (weight_N * label_N).sum() < weight_N.sum():
            return
        rate_N = np.full(len(label_N), np.average(label_N, weights=weight_N))
        assert metrics.normalized_entropy(rate_N, label_N, weight_N) == pytest.approx(1)
        assert metrics.calibration(rate_N, label_N, weight_N) == pytest.approx(1)


class TestInvariances:
    @many_examples
    @given(binary_rows, st.randoms(use_true_random=False))
    def test_order_of_rows(self, rows, random):
        order = np.array(random.sample(range(len(rows[0])), len(rows[0])), int)
        probability_N, label_N, weight_N, group_N = rows
        shuffled = [column[order] for column in (probability_N, label_N, group_N, weight_N)]
        assert metrics.binary_metrics(*shuffled) == close(metrics.binary_metrics(probability_N, label_N, group_N, weight_N))
        duration = metrics.duration_metrics(probability_N, label_N, weight_N)
        assert metrics.duration_metrics(shuffled[0], shuffled[1], shuffled[3]) == close(duration)

    @many_examples
    @given(columns(few_values, st.integers(0, 1), groups))
    def test_order_metrics_only_see_the_order(self, rows):
        prediction_N, label_N, group_N = rows
        moved_N = np.exp(9 * prediction_N) - 50
        assert metrics.auc(moved_N, label_N) == metrics.auc(prediction_N, label_N)
        assert metrics.grouped_auc(moved_N, label_N, group_N) == metrics.grouped_auc(prediction_N, label_N, group_N)
        assert metrics.xauc(moved_N, np.sqrt(label_N)) == metrics.xauc(prediction_N, label_N)

    @many_examples
    @given(columns(probabilities, st.integers(0, 1), st.integers(0, 3), groups))
    def test_a_whole_weight_is_that_many_rows(self, rows):
        probability_N, label_N, weight_N, group_N = rows
        weighted = metrics.binary_metrics(probability_N, label_N, group_N, weight_N)
        repeated = metrics.binary_metrics(*(np.repeat(column, weight_N) for column in (probability_N, label_N, group_N)))
        assert weighted["rows"] == np.count_nonzero(weight_N) and repeated["rows"] == weight_N.sum()
        assert weighted == close(repeated | {name: weighted[name] for name in ("rows", "positives")})

    def test_rows_of_weight_zero_count_for_nothing(self):
        probability_N, label_N, group_N = np.array([0.2, 0.9, 0.4, np.nan, 7.0]), np.array([0, 1, 1, 5, np.nan]), np.array([1, 1, 1, 1, 2])
        weight_N = np.array([1, 2, 0.5, 0, 0])
        kept = [column[:3] for column in (probability_N, label_N, group_N, weight_N)]
        assert metrics.binary_metrics(probability_N, label_N, group_N, weight_N) == metrics.binary_metrics(*kept)
        assert metrics.duration_metrics(probability_N, label_N, weight_N) == metrics.duration_metrics(*kept[:2], kept[3])

    def test_input_is_not_changed_and_any_number_type_will_do(self):
        probability_N, label_N = np.array([0.25, 0.75, 0.5], np.float32), np.array([False, True, True])
        before = probability_N.copy(), label_N.copy()
        as_lists = metrics.binary_metrics([0.25, 0.75, 0.5], [0, 1, 1], [3, 3, 4], [1, 1, 1])
        assert metrics.binary_metrics(probability_N, label_N, np.array([3, 3, 4], np.int32), np.ones(3, np.float16)) == as_lists
        assert np.array_equal(probability_N, before[0]) and np.array_equal(label_N, before[1])


class TestUndefined:
    def test_empty(self):
        no_binary = {"rows": 0, "positives": 0, "auc": None, "gauc": None, "ne": None, "logloss": None, "calibration": None}
        no_duration = {"rows": 0, "mae": None, "rmse": None, "xauc": None, "calibration": None}
        assert metrics.binary_metrics([], [], []) == no_binary
        assert metrics.duration_metrics([], []) == no_duration
        assert metrics.binary_metrics([0.5], [1], [1], [0]) == no_binary
        assert metrics.duration_metrics([0.5], [1], [0]) == no_duration
        tasks = [TaskColumns("ctr", "binary", None, [], []), TaskColumns("dwell", "duration", "ctr", [], [])]
        dwell = {"kind": "duration", "given": "ctr"} | no_duration | {"joint": no_duration}
        expected = {"tasks": {"ctr": {"kind": "binary"} | no_binary, "dwell": dwell}, "scenarios": {}}
        assert metrics.report(tasks, group_N=[], scenario_N=[]) == expected

    @pytest.mark.parametrize("label", [0, 1])
    def test_one_class(self, label):
        result = metrics.binary_metrics([0.2, 0.6], [label, label], [1, 1])
        assert (result["auc"], result["gauc"], result["ne"]) == (None, None, None)
        assert result["calibration"] == (pytest.approx(0.4) if label else None)
        assert result["logloss"] == pytest.approx(-np.log([0.2, 0.6] if label else [0.8, 0.4]).mean())
        assert metrics.auc([0.2, 0.6], [0, 1], [1, 0]) is None
        assert metrics.grouped_auc([0.2, 0.6], [0, 1], [1, 2]) is None
        assert metrics.xauc([1, 2], [label, label]) is None

    def test_beyond_float64_is_none(self):
        with np.errstate(over="ignore"):
            assert metrics.rmse([1e300], [0.0]) is None
            assert metrics.calibration([1e300], [1e-300]) is None

    @many_examples
    @given(binary_rows)
    def test_results_are_plain_json(self, rows):
        probability_N, label_N, weight_N, group_N = rows
        for result in (metrics.binary_metrics(probability_N, label_N, group_N, weight_N), metrics.duration_metrics(*rows[:3])):
            assert {type(value) for value in result.values()} <= {int, float, type(None)}
            assert json.loads(json.dumps(result, allow_nan=False)) == result


class TestRefusals:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_predictions_that_are_not_finite(self, bad):
        prediction_N, label_N = np.array([0.5, bad, 0.1, bad]), np.array([0, 1, 0, 1])
        calls = [metrics.auc, metrics.log_loss, metrics.normalized_entropy, metrics.calibration, metrics.mae, metrics.rmse, metrics.xauc]
        calls += [metrics.binary_metrics, metrics.duration_metrics, lambda *rows: metrics.grouped_auc(*rows, label_N)]
        for call in calls:
            with pytest.raises(ValueError, match=r"^2 of 4 predictions are not finite$"):
                call(prediction_N, label_N)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (([0.5, 1.5], [0, 1]), "1 of 2 probabilities lie outside 0 to 1"),
            (([0.5, 0.5], [0, 2]), "1 of 2 labels are neither 0 nor 1"),
            (([0.5, 0.5], [0, np.nan]), "1 of 2 labels are not finite"),
            (([0.5, 0.5], [0, 1], None, [1, -1]), "1 of 2 weights are negative or not finite"),
            (([0.5, 0.5], [0, 1], None, [np.nan, 1]), "1 of 2 weights are negative or not finite"),
            (([0.5, 0.5], [0, 1], [0.5, 1.0]), "groups are float64, not integers"),
            (([0.5, 0.5], [0, 1, 1]), r"columns are not flat and of one length but of shapes \(2,\), \(3,\)"),
            (([[0.5], [0.5]], [[0], [1]]), r"columns are not flat and of one length but of shapes \(2, 1\)"),
        ],
    )
    def test_values_no_metric_can_take(self, arguments, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            metrics.binary_metrics(*arguments)
