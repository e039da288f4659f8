"""The objective equals a loop over rows and tasks, the tower one over tasks and sides; what does not count changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from triptych.datasets.batch import Batch
from triptych.datasets.schema import DataSection, Feature, Schema
from triptych.embeddings.lookup import Lookup
from triptych.embeddings.tables import PREFIX, EmbeddingTable, meta_collections
from triptych.mmoe.heads import Task
from triptych.mmoe.losses import sum_over_ranks
from triptych.mmoe.model import ModelSection, Outputs, Recommender, RetrievalSection, Tower
from triptych.mmoe.train_task import Objective, TrainTask

some_examples = settings(deadline=None, max_examples=60)
TABLES = (EmbeddingTable(name="user", rows=11, dim=4), EmbeddingTable(name="item", rows=13, dim=8))
FEATURES = (
    Feature(name="age", kind="dense", side="user"),
    Feature(name="item", kind="id", table="item", side="item"),
    Feature(name="pixels", kind="vector", size=2, side="item"),
    Feature(name="page", kind="id", table="user"),
    Feature(name="hour", kind="dense"),
    Feature(name="seen", kind="ids", table="item", side="user"),
    Feature(name="length", kind="dense", side="item"),
    Feature(name="user", kind="id", table="user", side="user"),
    Feature(name="score", kind="dense", side="user"),
)
FULL_BATCH = 8
DENSE_COLUMNS = {"user": [0, 5], "item": [1, 2, 4], "context": [3]}
VECTOR_WIDTHS = {"user": 12, "item": 8, "context": 4}
RETRIEVAL = RetrievalSection(user="user", item="item", dim=3, layers=(5,), task="cvr", weight=0.7)


def tasks_of(estimator="masked", weights=(1.0, 2.5, 0.25), predict="mean"):
    return (
        Task(name="ctr", kind="binary", label="click", weight=weights[0]),
        Task(name="cvr", kind="binary", label="buy", given="ctr", estimator=estimator, weight=weights[1]),
        Task(name="dwell", kind="duration", label="seconds", given="ctr", delta=0.5, cap=600, predict=predict, weight=weights[2]),
    )


def schema_of(tasks):
    return Schema(DataSection(root=".", batch_size=FULL_BATCH), TABLES, FEATURES, tasks)


def objective_of(tasks, retrieval=RETRIEVAL):
    return Objective(tasks, schema_of(tasks), retrieval)


def random_batch(num_rows, seed, dtype=torch.float64):
    """Rows of random ids, dense values, consistent labels, and weights of which some are 0."""
    random = torch.Generator().manual_seed(seed)
    click_B, buy_B = torch.randint(0, 2, (2, num_rows), generator=random)
    seconds_B = 100 * torch.rand(num_rows, generator=random)
    lengths = torch.cat([torch.ones(3 * num_rows, dtype=torch.long), torch.randint(0, 4, (num_rows,), generator=random)])
    return Batch(
        ids=KeyedJaggedTensor(
            ["item", "page", "user", "seen"], torch.randint(0, 11, (int(lengths.sum()),), generator=random), lengths=lengths
        ),
        dense_BD=torch.randn(num_rows, 6, generator=random, dtype=dtype),
        labels_BT=torch.stack([click_B, click_B * buy_B, click_B * seconds_B], 1).to(dtype),
        known_BT=torch.stack([torch.ones_like(click_B), click_B, click_B], 1).bool(),
        weight_B=(torch.rand(num_rows, generator=random) * torch.randint(0, 3, (num_rows,), generator=random)).to(dtype),
        row_B=torch.arange(num_rows),
    )


def random_outputs(num_rows, seed, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    values = [3 * torch.randn(*shape, generator=random, dtype=dtype) for shape in ((num_rows, 3), (num_rows,))]
    return Outputs(*(value.requires_grad_() for value in values))


def random_vectors(num_rows, dtype=torch.float64):
    torch.manual_seed(1)
    return {side: torch.randn(num_rows, width, dtype=dtype) for side, width in VECTOR_WIDTHS.items()}


def cross_entropy(p, label):
    return -torch.log(p if label else 1 - p)


def loss_of_row(name, outputs, row, labels, estimator):
    click, cvr, centre = outputs.logits_BT[row]
    if name == "dwell":
        error = (centre - math.log(1 + labels[2])).abs()
        return (error**2 / 2 if error <= 0.5 else 0.5 * (error - 0.25)) / 0.5
    if name == "cvr" and estimator == "esmm":
        return cross_entropy(torch.sigmoid(click) * torch.sigmoid(cvr), labels[0] * labels[1])
    logit = {"ctr": click, "cvr": cvr, "retrieval": outputs.affinity_B[row]}[name]
    return cross_entropy(torch.sigmoid(logit), labels[0 if name == "ctr" else 1])


def naive_losses(outputs, batch, estimator):
    """Each loss's weighted mean over the rows where it counts: all, or those with a click."""
    losses = []
    for name in ("ctr", "cvr", "dwell", "retrieval"):
        total, count = 0 * outputs.logits_BT.sum(), 0.0
        for row, labels in enumerate(batch.labels_BT.tolist()):
            weight = batch.weight_B[row].item()
            if weight and (name == "ctr" or labels[0] or (name == "cvr" and estimator == "esmm")):
                total = total + weight * loss_of_row(name, outputs, row, labels, estimator)
                count += weight
        losses.append(total / count if count else total)
    return torch.stack(losses)


class TestObjective:
    @some_examples
    @given(st.integers(1, 8), st.integers(0, 999), st.sampled_from(["masked", "esmm"]), st.tuples(*[st.floats(0, 5)] * 3))
    def test_loss_is_the_weighted_sum_of_means(self, num_rows, seed, estimator, weights):
        objective, batch, outputs = objective_of(tasks_of(estimator, weights)), random_batch(num_rows, seed), random_outputs(num_rows, seed)
        loss, report = objective(outputs, batch)
        expected_L = naive_losses(outputs, batch, estimator)
        # A batch that is not full weighs as many rows as it has: every row of an epoch counts the same.
        expected = (expected_L * torch.tensor([*weights, 0.7])).sum() * num_rows / FULL_BATCH
        assert objective.loss_names == ["ctr", "cvr", "dwell", "retrieval"]
        torch.testing.assert_close(report.losses_L, expected_L.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # the weights are float32
        gradient, expected_gradient = (torch.autograd.grad(total, list(outputs), materialize_grads=True) for total in (loss, expected))
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("estimator", ["masked", "esmm"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("logit", [-math.inf, -1e30, -1e4, 1e4, 1e30, math.inf])
    def test_rows_of_weight_zero_change_nothing_even_if_they_overflow(self, logit, dtype, estimator):
        batch, outputs = random_batch(6, 4, dtype), random_outputs(6, 4, dtype)
        objective, padded = objective_of(tasks_of(estimator)), objective_of(tasks_of(estimator))
        loss, report = objective(outputs, batch)
        padded_batch = Batch(
            ids=batch.ids,
            dense_BD=F.pad(batch.dense_BD, (0, 0, 0, 3)),
            labels_BT=torch.cat([batch.labels_BT, torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 9]])]),
            known_BT=torch.cat([batch.known_BT, torch.tensor([[False] * 3, [True] * 3, [True] * 3])]),
            weight_B=F.pad(batch.weight_B, (0, 3)),
            row_B=F.pad(batch.row_B, (0, 3), value=-1),
        )
        extra = Outputs(torch.full((3, 3), logit, dtype=dtype), torch.full((3,), logit, dtype=dtype))
        padded_outputs = Outputs(*(torch.cat([value.detach(), more]).requires_grad_() for value, more in zip(outputs, extra, strict=True)))
        padded_loss, padded_report = padded(padded_outputs, padded_batch)
        assert torch.equal(padded_report.losses_L, report.losses_L) and torch.equal(padded_loss, loss)
        assert torch.equal(padded.heads[2].smearing_2, objective.heads[2].smearing_2)
        gradients = torch.autograd.grad(loss, list(outputs))
        padded_gradients = torch.autograd.grad(padded_loss, list(padded_outputs))
        for gradient, padded_gradient in zip(gradients, padded_gradients, strict=True):
            assert torch.equal(padded_gradient[:6], gradient) and (padded_gradient[6:] == 0).all()

    def test_rows_without_a_click_may_overflow_what_only_clicks_have(self):
        objective, batch, outputs = objective_of(tasks_of()), random_batch(6, 4), random_outputs(6, 4)
        expected, _ = objective(outputs, batch)
        unclicked = ~batch.known_BT[:, 1]
        assert 0 < unclicked.sum() < 6
        for logit in (-1e30, 1e30):
            logits_BT, affinity_B = outputs.logits_BT.detach().clone(), outputs.affinity_B.detach().clone()
            logits_BT[unclicked, 1:], affinity_B[unclicked] = logit, logit
            assert torch.equal(objective(Outputs(logits_BT, affinity_B), batch)[0], expected)

    @pytest.mark.parametrize("weight", [0.5, 1e6])
    def test_without_clicks_retrieval_has_no_gradient(self, weight):
        tasks = tasks_of()
        objective = objective_of(tasks, RETRIEVAL.model_copy(update={"weight": weight}))
        batch, outputs = random_batch(5, 0, torch.float32), random_outputs(5, 0, torch.float32)
        batch.labels_BT[:], batch.known_BT[:, 1:] = 0, False
        loss, report = objective(outputs, batch)
        gradient_BT, gradient_B = torch.autograd.grad(loss, list(outputs))
        assert report.losses_L[1:].eq(0).all() and gradient_BT[:, 1:].eq(0).all() and gradient_B.eq(0).all()

    @pytest.mark.parametrize("names", [["ctr"], ["cvr"], ["dwell"], ["retrieval"], ["ctr", "dwell"]])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_is_named_and_leaves_no_trace(self, names, value):
        objective, batch, outputs = objective_of(tasks_of()), random_batch(8, 1), random_outputs(8, 1)
        row = int(torch.nonzero(batch.known_BT[:, 1] & (batch.weight_B > 0) & (batch.labels_BT[:, 1] == 0))[0])
        logits_BT, affinity_B = (part.detach().clone() for part in outputs)
        for name in names:
            if name == "retrieval":
                affinity_B[row] = value
            else:
                logits_BT[row, ["ctr", "cvr", "dwell"].index(name)] = -value if name == "ctr" else value
        logits_BT.requires_grad_(), affinity_B.requires_grad_()
        loss, report = objective(Outputs(logits_BT, affinity_B), batch)
        assert report.bad_losses == tuple(names)
        assert torch.nonzero(report.bad_B).flatten().tolist() == [row] and torch.equal(report.row_B, batch.row_B)
        loss.backward()
        assert loss == 0 and logits_BT.grad is None and affinity_B.grad is None
        assert objective.heads[2].smearing_2.eq(0).all()

    def test_finite_losses_whose_sum_is_not_blame_no_row(self):
        objective, batch, outputs = objective_of(tasks_of()), random_batch(8, 1, torch.float32), random_outputs(8, 1, torch.float32)
        batch.weight_B[:] = 1
        logits_BT = outputs.logits_BT.detach().clone()
        logits_BT[:, 0] = torch.where(batch.labels_BT[:, 0] > 0, -3e38, 3e38)
        _, report = objective(Outputs(logits_BT, outputs.affinity_B), batch)
        assert report.bad_losses == ("ctr",) and not report.bad_B.any()

    def test_a_finite_step_blames_nobody(self):
        _, report = objective_of(tasks_of())(random_outputs(8, 1), random_batch(8, 1))
        assert report.bad_losses == () and report.bad_B is None

    def test_evaluation_predicts_and_learns_nothing(self):
        objective, batch, outputs = objective_of(tasks_of()), random_batch(6, 4), random_outputs(6, 4)
        objective(outputs, batch)
        smearing = objective.heads[2].smearing_2.clone()
        loss, prediction_BT = objective.eval()(outputs, batch)
        clicked = batch.known_BT[:, 2]
        residual_B = torch.exp(torch.log1p(batch.labels_BT[:, 2]) - outputs.logits_BT[:, 2])[clicked]
        factor = (batch.weight_B[clicked] * residual_B).sum() / batch.weight_B[clicked].sum()
        seconds_B = (torch.exp(outputs.logits_BT[:, 2]) * factor - 1).clamp(0, 600)
        expected_BT = torch.cat([torch.sigmoid(outputs.logits_BT[:, :2]), seconds_B.unsqueeze(1)], 1)
        torch.testing.assert_close(prediction_BT, expected_BT, rtol=1e-6, atol=1e-6)
        assert prediction_BT.shape == (6, 3) and loss.shape == () and loss == 0 and not loss.requires_grad
        assert torch.equal(objective.heads[2].smearing_2, smearing)

    def test_one_process_sums_alone(self):
        sums = torch.tensor([1.0, 2.0], requires_grad=True)
        total = sum_over_ranks(sums)
        assert torch.equal(total, sums) and not total.requires_grad and total.data_ptr() != sums.data_ptr()


def tower_of(retrieval=RETRIEVAL, precision="fp32", **section):
    torch.manual_seed(0)
    section = ModelSection(**{"experts": 3, "expert_layers": (16, 8), "tower_layers": (6, 5)} | section)
    tower = Tower(section, retrieval, schema_of(tasks_of()), TABLES, precision)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # initial biases may be zero
    return tower


def encode(encoder, x):
    for layer in encoder.layers:
        x = F.relu(x) if isinstance(layer, torch.nn.ReLU) else x @ layer.weight.T + layer.bias
    return x


class TestTower:
    @pytest.mark.parametrize("sharing", ["shared_bottom", "mmoe", "cgc", "ple"])
    @pytest.mark.parametrize("tower_layers", [(), (6,), (6, 5)])
    def test_logits_are_a_loop_over_tasks(self, sharing, tower_layers):
        tower = tower_of(sharing=sharing, tower_layers=tower_layers).double()
        vectors, dense_BD = random_vectors(7), torch.randn(7, 6, dtype=torch.float64)
        x_BI = torch.cat([vectors["user"], vectors["item"], vectors["context"], dense_BD], 1)
        logits = []
        for task, z_BH in enumerate(tower.sharing(x_BI)):
            for layer in tower.task_towers.linears:
                z_BH = F.relu(z_BH @ layer.weight_GIO[task] + layer.bias_GO[task])
            logits.append(z_BH @ tower.task_outputs.weight_GIO[task, :, 0] + tower.task_outputs.bias_GO[task])
        torch.testing.assert_close(tower(vectors, dense_BD).logits_BT, torch.stack(logits, 1).float(), rtol=1e-6, atol=1e-7)

    def test_affinity_is_inner_product_plus_bias(self):
        tower = tower_of().double()
        vectors, dense_BD = random_vectors(7), torch.randn(7, 6, dtype=torch.float64)
        of_side = {side: torch.cat([vectors[side], dense_BD[:, DENSE_COLUMNS[side]]], 1) for side in ("user", "item")}
        user_BD, item_BD = (encode(tower.encoders[side], x_BI) for side, x_BI in of_side.items())
        expected_B = torch.stack([u @ i + tower.affinity_bias for u, i in zip(user_BD, item_BD, strict=True)])
        torch.testing.assert_close(tower(vectors, dense_BD).affinity_B, expected_B.float(), rtol=1e-6, atol=1e-7)
        assert tower_of(retrieval=None)(random_vectors(7, torch.float32), dense_BD.float()).affinity_B is None

    @pytest.mark.parametrize("side", ["user", "item"])
    def test_dense_columns_reach_the_encoder_of_their_side_alone(self, side):
        encoder, vectors = tower_of().encoders[side], random_vectors(64, torch.float32)
        dense_BD = torch.randn(64, 6, requires_grad=True)
        gradient_BD = torch.autograd.grad(encoder(vectors, dense_BD).pow(2).sum(), dense_BD)[0]
        assert torch.nonzero(gradient_BD.abs().sum(0)).flatten().tolist() == DENSE_COLUMNS[side]

    def test_bf16_is_near_fp32_and_typed_float32(self):
        vectors, dense_BD = random_vectors(256, torch.float32), torch.randn(256, 6)
        exact, rounded = (tower_of(precision=precision)(vectors, dense_BD) for precision in ("fp32", "bf16"))
        for exact_part, rounded_part in zip(exact, rounded, strict=True):
            assert rounded_part.dtype == torch.float32
            error = (rounded_part - exact_part).abs().max() / exact_part.abs().max()
            # bf16 rounds by up to 2^-9; an error of exactly 0 would mean that it was not used.
            assert 0 < error < 8 * 2**-9


class TestTrainTask:
    def test_is_the_objective_of_the_tower_of_looked_up_vectors(self):
        tasks, batch = tasks_of("esmm"), random_batch(9, 2, torch.float32)
        schema = schema_of(tasks)
        torch.manual_seed(1)
        collections = meta_collections(TABLES, schema)
        assert collections.bags is not None and not collections.sequences
        tables = collections.bags.to_empty(device="cpu")
        for bag in tables.embedding_bags.values():
            bag.weight.data.normal_()
        task = TrainTask(Recommender(Lookup(collections, schema), tower_of()), objective_of(tasks))
        weights = {
            feature: tables.embedding_bags[PREFIX + table].weight
            for feature, table in {f.name: f.table for f in FEATURES if f.is_id}.items()
        }
        pooled = {
            name: torch.stack([weights[name][ids].sum(0) / max(len(ids), 1) for ids in jagged.to_dense()])
            for name, jagged in batch.ids.to_dict().items()
        }
        vectors = {"user": torch.cat([pooled["seen"], pooled["user"]], 1), "item": pooled["item"], "context": pooled["page"]}
        loss, report = task(batch)
        expected_loss, expected_report = objective_of(tasks)(task.model.tower(vectors, batch.dense_BD), batch)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(report.losses_L, expected_report.losses_L)
        of = list(task.parameters())
        torch.testing.assert_close(torch.autograd.grad(loss, of), torch.autograd.grad(expected_loss, of), rtol=1e-4, atol=1e-6)
        assert torch.equal(task.eval()(batch)[1], task.objective(task.model(batch), batch)[1])
