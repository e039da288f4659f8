"""Losses and heads equal their definitions: to 100 digits where logarithms are delicate, row by row elsewhere, on samples for smearing."""

import itertools
import math
from decimal import Context, Decimal, localcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from triptych.datasets.batch import Batch
from triptych.datasets.schema import DataSection, Feature, Schema, TableIds
from triptych.mmoe.heads import SMEARING_DECAY, BinaryHead, DurationHead, Task, make_head
from triptych.mmoe.losses import log_huber, log_one_minus_exp, product_cross_entropy
from triptych.mmoe.model import Outputs
from triptych.mmoe.train_task import Objective

many_examples = settings(deadline=None, max_examples=150)
precisions = st.sampled_from([(torch.float32, 3e-5), (torch.float64, 1e-12)])
logits = st.floats(-40, 40, width=32)
CTR = Task(name="ctr", kind="binary", label="click")
DWELL = Task(name="dwell", kind="duration", label="seconds", given="ctr")


def schema_of(*tasks):
    return Schema(DataSection(root="."), (TableIds(name="t", rows=9),), (Feature(name="u", kind="id", table="t"),), tasks)


def batch_of(labels, known, weights=None, dtype=torch.float64):
    labels_BT = torch.tensor(labels, dtype=dtype)
    num_rows = len(labels_BT)
    return Batch(
        ids=KeyedJaggedTensor(["u"], torch.zeros(num_rows, dtype=torch.long), lengths=torch.ones(num_rows, dtype=torch.long)),
        dense_BD=torch.zeros(num_rows, 0),
        labels_BT=labels_BT,
        known_BT=torch.tensor(known, dtype=torch.bool),
        weight_B=torch.ones(num_rows, dtype=dtype) if weights is None else torch.tensor(weights, dtype=dtype),
        row_B=torch.arange(num_rows),
    )


def exact_log_one_minus_exp(x):
    """Value and derivative, to 100 digits."""
    with localcontext(Context(prec=100)):
        exp = Decimal(x).exp()
        return float((1 - exp).ln()), float(-exp / (1 - exp))


def exact_product_cross_entropy(logits, label):
    """BCE(product of sigmoids, label) and its derivative by each logit, to 100 digits."""
    with localcontext(Context(prec=100)):
        probabilities = [1 / (1 + (-Decimal(logit)).exp()) for logit in logits]
        product = math.prod(probabilities, start=Decimal(1))
        if label:
            return float(-product.ln()), [float(p - 1) for p in probabilities]
        return float(-(1 - product).ln()), [float(product * (1 - p) / (1 - product)) for p in probabilities]


def check_product_cross_entropy(values, label, precision):
    dtype, tolerance = precision
    chain = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in values]
    loss_B = product_cross_entropy(chain, torch.tensor([float(label)], dtype=dtype))
    gradient = torch.cat(torch.autograd.grad(loss_B.sum(), chain))
    expected, expected_gradient = exact_product_cross_entropy(values, label)
    assert loss_B.dtype == dtype and torch.isfinite(gradient).all()
    torch.testing.assert_close(loss_B.double(), torch.tensor([expected], dtype=torch.float64), rtol=tolerance, atol=1e-37)
    torch.testing.assert_close(gradient.double(), torch.tensor(expected_gradient, dtype=torch.float64), rtol=tolerance, atol=1e-37)


class TestLogOneMinusExp:
    @many_examples
    @given(st.one_of(st.floats(-36, 1.9), st.floats(-4, 0)).map(lambda power: -(10.0**power)), st.booleans())
    def test_value_and_derivative(self, value, double):
        dtype, tolerance = (torch.float64, 1e-14) if double else (torch.float32, 2e-6)
        x = torch.tensor(value, dtype=dtype, requires_grad=True)
        result = log_one_minus_exp(x)
        result.backward()
        expected, expected_derivative = exact_log_one_minus_exp(x.item())
        assert result.item() == pytest.approx(expected, rel=tolerance, abs=1e-37)
        assert x.grad.item() == pytest.approx(expected_derivative, rel=tolerance, abs=1e-37)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [0.0, -0.0, -1e-45, 1e-3, -1e4, -1e30, -math.inf])
    def test_beyond_what_it_is_for_it_stays_finite(self, value, dtype):
        x = torch.tensor(value, dtype=dtype, requires_grad=True)
        result = log_one_minus_exp(x)
        result.backward()
        assert torch.isfinite(result) and torch.isfinite(x.grad) and result <= 0


class TestProductCrossEntropy:
    @many_examples
    @given(st.lists(logits, min_size=1, max_size=3), st.integers(0, 1), precisions)
    def test_any_logits(self, values, label, precision):
        check_product_cross_entropy(values, label, precision)

    @pytest.mark.parametrize("precision", [(torch.float32, 3e-5), (torch.float64, 1e-12)])
    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_extreme_logits(self, length, precision):
        for values in itertools.product([-40.0, 0.0, 40.0], repeat=length):
            for label in (0, 1):
                check_product_cross_entropy(values, label, precision)

    @pytest.mark.parametrize("label", [0.0, 1.0])
    def test_logits_beyond_any_have_finite_gradients(self, label):
        for values in itertools.product([-1e30, -1e4, 1e4, 1e30], repeat=2):
            chain = torch.tensor(values, requires_grad=True)
            loss = product_cross_entropy([chain[:1], chain[1:]], torch.tensor([label])).sum()
            loss.backward()
            assert torch.isfinite(chain.grad).all() and not torch.isnan(loss)


# a -> b -> c, in another order than their chain's.
CHAIN = (
    Task(name="c", kind="binary", label="lc", given="b", estimator="esmm"),
    Task(name="a", kind="binary", label="la"),
    Task(name="b", kind="binary", label="lb", given="a", estimator="esmm"),
    Task(name="masked", kind="binary", label="lm", given="b"),
)


class TestBinaryHead:
    random = np.random.default_rng(0)
    a_B, b_B, c_B = random.integers(0, 2, (3, 64))
    all_B = np.ones(64, int)
    batch = batch_of(
        np.stack([a_B * b_B * c_B, a_B, a_B * b_B, a_B * b_B * c_B], 1),
        np.stack([a_B * b_B, all_B, a_B, a_B * b_B], 1),
        random.random(64),
    )
    logits_BT = torch.tensor(random.normal(0, 3, (64, 4)))
    heads = tuple(make_head(task, t, schema_of(*CHAIN)) for t, task in enumerate(CHAIN))

    @pytest.mark.parametrize("index, chain, label_B", [(0, [0, 1, 2], a_B * b_B * c_B), (2, [1, 2], a_B * b_B)])
    def test_esmm_is_cross_entropy_of_the_chains_product_over_all_rows(self, index, chain, label_B):
        loss_B, count_B = self.heads[index].loss(self.logits_BT, self.batch)
        product_B = torch.sigmoid(self.logits_BT[:, chain]).prod(1)
        expected_B = F.binary_cross_entropy(product_B, torch.tensor(label_B).double(), reduction="none")
        torch.testing.assert_close(loss_B, expected_B, rtol=1e-9, atol=1e-12)
        assert torch.equal(count_B, self.batch.weight_B)

    @pytest.mark.parametrize("index, label_B, rows_B", [(1, a_B, all_B), (3, c_B, a_B * b_B)])
    def test_masked_loss_is_a_loop_over_the_rows_where_the_condition_holds(self, index, label_B, rows_B):
        loss_B, count_B = self.heads[index].loss(self.logits_BT, self.batch)
        total, weight = 0.0, 0.0
        for row in np.flatnonzero(rows_B):
            p, row_weight = 1 / (1 + math.exp(-self.logits_BT[row, index])), self.batch.weight_B[row].item()
            total += row_weight * -math.log(p if label_B[row] else 1 - p)
            weight += row_weight
        assert (loss_B * count_B).sum().item() / count_B.sum().item() == pytest.approx(total / weight, rel=1e-9)

    @pytest.mark.parametrize("index", range(4))
    def test_prediction_is_its_own_probability_whatever_the_estimator(self, index):
        assert torch.equal(self.heads[index].prediction(self.logits_BT), torch.sigmoid(self.logits_BT[:, index]))


class TestMaskedNulls:
    """Any label of the chain a -> b -> c may be null, and is then 0 and not known, as are those that are given it."""

    random = np.random.default_rng(1)
    chain_B3 = random.choice([0, 1, 1, None], (96, 3))
    weight_B, logits_BT = random.random(96), torch.tensor(random.normal(0, 3, (96, 4)))
    weight_B[::7] = 0

    def batch(self):
        labels, known = [], []
        for a, b, c in self.chain_B3:
            known.append(
                [a == 1 and b == 1 and c is not None, a is not None, a == 1 and b is not None, a == 1 and b == 1 and c is not None]
            )
            labels.append([value or 0 if is_known else 0 for value, is_known in zip((c, a, b, c), known[-1], strict=True)])
        return batch_of(labels, known, self.weight_B)

    @pytest.mark.parametrize(("index", "length"), [(0, 3), (2, 2)])
    def test_esmm_counts_a_row_once_its_product_is_certain(self, index, length):
        loss_B, count_B = make_head(CHAIN[index], index, schema_of(*CHAIN)).loss(self.logits_BT, self.batch())
        total, counted = 0.0, []
        for row, labels in enumerate(self.chain_B3):
            product = 1
            for label in labels[:length]:
                product = label
                if label != 1:
                    break
            counted.append(0.0 if product is None else self.weight_B[row])
            p = math.prod(1 / (1 + math.exp(-self.logits_BT[row, place])) for place in [1, 2, 0][:length])
            total += counted[-1] * -math.log(p if product else 1 - p)
        assert count_B.tolist() == counted and 0 < sum(count == 0 for count in counted) - sum(self.weight_B == 0) < 96
        assert (loss_B * count_B).sum().item() == pytest.approx(total, rel=1e-9)

    @pytest.mark.parametrize("index", [1, 3])
    def test_masked_counts_the_rows_where_its_own_label_is_known(self, index):
        _, count_B = make_head(CHAIN[index], index, schema_of(*CHAIN)).loss(self.logits_BT, self.batch())
        known = [a is not None if index == 1 else a == b == 1 and c is not None for a, b, c in self.chain_B3]
        assert count_B.tolist() == [weight if is_known else 0.0 for weight, is_known in zip(self.weight_B, known, strict=True)]


class TestDurationHead:
    @many_examples
    @given(st.lists(st.tuples(st.floats(-20, 20), st.floats(0, 1e6)), min_size=1, max_size=9), st.floats(0.01, 10))
    def test_log_huber_is_its_definition(self, rows, delta):
        losses = []
        for centre, seconds in rows:
            error = abs(centre - math.log(1 + seconds))
            losses.append((error**2 / 2 if error <= delta else delta * (error - delta / 2)) / delta)
        centre_B, seconds_B = torch.tensor(rows, dtype=torch.float64).T
        torch.testing.assert_close(log_huber(centre_B, seconds_B, delta), torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        head = DurationHead(DWELL.model_copy(update={"delta": delta}), 1)
        batch = batch_of([[1, seconds] for _, seconds in rows], [[1, 1]] * len(rows))
        assert torch.equal(head.loss(torch.stack([centre_B, centre_B], 1), batch)[0], log_huber(centre_B, seconds_B, delta))

    @staticmethod
    def trained(head, centre_B, seconds_B, batch_size):
        """Show the head rows batch by batch, as training does."""
        for start in range(0, len(centre_B), batch_size):
            rows = slice(start, start + batch_size)
            batch = batch_of(torch.stack([seconds_B[rows]], 1).tolist(), [[True]] * len(centre_B[rows]))
            scale_B = head.residual_scale(centre_B[rows].unsqueeze(1), batch)
            head.observe(scale_B.sum(), torch.tensor(len(scale_B)))
        return head

    def test_mean_is_calibrated_on_lognormal_rows(self):
        """log(1 + y) = m + sigma e has E[y] = exp(m + sigma^2 / 2) - 1; bounds are five standard errors of a mean of exp(sigma e)."""
        random, num_rows, sigma = np.random.default_rng(1), 40_000, 0.8
        centre_B = torch.tensor(random.uniform(5, 7, num_rows))
        seconds_B = torch.expm1(centre_B + sigma * torch.tensor(random.normal(size=num_rows)))
        assert seconds_B.min() >= 0
        head = self.trained(DurationHead(DWELL.model_copy(update={"given": None}), 0), centre_B, seconds_B, num_rows // 4)
        bound = 5 * math.sqrt(math.expm1(sigma**2) / num_rows)
        prediction_B = head.prediction(centre_B.unsqueeze(1))
        torch.testing.assert_close(prediction_B, torch.expm1(centre_B + sigma**2 / 2), rtol=1.1 * bound, atol=0)
        assert prediction_B.mean().item() / seconds_B.mean().item() == pytest.approx(1, abs=2 * bound)

    @many_examples
    @given(st.lists(st.floats(0, 1e5), min_size=1, max_size=20), st.floats(-3, 12))
    def test_mean_of_equal_rows_is_their_mean_wherever_the_centre_lies(self, seconds, centre):
        centre_B, seconds_B = torch.full((len(seconds),), centre, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
        head = self.trained(DurationHead(DWELL, 0), centre_B, seconds_B, len(seconds))
        assert head.prediction(centre_B.unsqueeze(1))[0].item() == pytest.approx(seconds_B.mean().item(), rel=1e-6, abs=1e-6)

    @many_examples
    @given(st.lists(st.tuples(st.floats(0, 100), st.one_of(st.just(0.0), st.floats(0.1, 1e3))), min_size=1, max_size=6))
    def test_smearing_is_a_decayed_mean(self, steps):
        head = DurationHead(DWELL, 0)
        observed = np.float32([(mean_scale * count, count) for mean_scale, count in steps])
        for scale_sum, count in observed:
            head.observe(torch.tensor(scale_sum), torch.tensor(count))
        ages = SMEARING_DECAY ** np.arange(len(observed))[::-1]
        scale_sum, count = (ages[:, None] * observed).sum(0)
        expected = math.exp(2) * (scale_sum / count if count > 0 else 1) - 1
        assert head.prediction(torch.tensor([[2.0]])).item() == pytest.approx(max(expected, 0), rel=1e-5, abs=1e-5)

    def test_median_is_the_centre_cap_and_floor(self):
        logits_BT = torch.tensor([[-5.0], [0.0], [1.0], [3.0], [4.5], [60.0], [200.0]])
        median = DurationHead(DWELL.model_copy(update={"predict": "median", "cap": 60.0}), 0)
        mean = DurationHead(DWELL.model_copy(update={"cap": 60.0}), 0)
        expected_B = torch.tensor([0, 0, math.e - 1, math.e**3 - 1, 60, 60, 60])
        torch.testing.assert_close(mean.prediction(logits_BT), expected_B)  # nothing seen yet
        for head in (median, mean):
            head.observe(torch.tensor(6.0), torch.tensor(4.0))
        torch.testing.assert_close(median.prediction(logits_BT), expected_B)
        expected_B = torch.tensor([0, 0.5, 1.5 * math.e - 1, 1.5 * math.e**3 - 1, 60, 60, 60])
        torch.testing.assert_close(mean.prediction(logits_BT), expected_B)

    def test_smearing_is_saved_with_the_weights(self):
        head, other = DurationHead(DWELL, 0), DurationHead(DWELL, 0)
        head.observe(torch.tensor(6.0), torch.tensor(4.0))
        other.load_state_dict(head.state_dict())
        assert other.prediction(torch.tensor([[1.0]])) == head.prediction(torch.tensor([[1.0]])) != math.e - 1


class TestRowsThatDoNotCount:
    tasks = (CTR, Task(name="cvr", kind="binary", label="buy", given="ctr", weight=100), DWELL.model_copy(update={"weight": 100.0}))

    @pytest.mark.parametrize("estimator", ["masked", "esmm"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_batch_without_clicks(self, estimator, dtype):
        tasks = (self.tasks[0], self.tasks[1].model_copy(update={"estimator": estimator}), self.tasks[2])
        objective = Objective(tasks, schema_of(*tasks), None)
        logits_BT = torch.tensor([[0.3, -2, 1], [-1, 40, -95]], dtype=dtype, requires_grad=True)
        loss, report = objective(Outputs(logits_BT, None), batch_of([[0, 0, 0]] * 2, [[1, 0, 0]] * 2, dtype=dtype))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits_BT.grad).all()
        assert (report.losses_L[2] == 0) and (logits_BT.grad[:, 2] == 0).all() and (logits_BT.grad[:, 0] != 0).all()
        if estimator == "masked":
            assert (report.losses_L[1] == 0) and (logits_BT.grad[:, 1] == 0).all()
        assert objective.heads[2].smearing_2[1] == 0

    def test_make_head_goes_by_kind(self):
        heads = [make_head(task, t, schema_of(*self.tasks)) for t, task in enumerate(self.tasks)]
        assert [type(head) for head in heads] == [BinaryHead, BinaryHead, DurationHead]
