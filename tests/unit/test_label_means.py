"""Training starts at the label means: an untrained head predicts its label's weighted mean over the known rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_train_task import RETRIEVAL, TABLES, objective_of, random_batch, random_vectors, schema_of, tasks_of
from triptych.embeddings.lookup import Lookup
from triptych.embeddings.tables import meta_collections
from triptych.mmoe.model import ModelSection, Recommender, Tower
from triptych.mmoe.train_task import TrainTask


def naive_means(batch):
    """Click rate, buy rate among clicks, mean of log(1 + seconds) among clicks; weighted, None where nothing is known."""
    totals, counts = [0.0] * 3, [0.0] * 3
    for (click, buy, seconds), weight in zip(batch.labels_BT.tolist(), batch.weight_B.tolist(), strict=True):
        for t, target in enumerate((click, buy, torch.log1p(torch.tensor(seconds, dtype=torch.float64)).item())):
            known = 1.0 if t == 0 else click
            totals[t] += weight * known * target
            counts[t] += weight * known
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]


def naive_logits(batch):
    """An unknown mean starts at logit 0."""
    click, buy, log_seconds = naive_means(batch)
    logits = [0.0 if mean is None else torch.logit(torch.tensor(mean, dtype=torch.float64), eps=1e-4).item() for mean in (click, buy)]
    return [*logits, 0.0 if log_seconds is None else log_seconds]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(0, 999))
def test_label_means_equal_a_loop(num_rows, seed):
    batch = random_batch(num_rows, seed)
    found_T = objective_of(tasks_of()).label_means(batch)
    torch.testing.assert_close(found_T, torch.tensor(naive_logits(batch), dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("retrieval", [RETRIEVAL, None])
def test_biases_move_to_the_means_and_nothing_else_moves(retrieval):
    tasks = tasks_of(predict="median")
    schema = schema_of(tasks)
    tower = Tower(ModelSection(expert_layers=(4,), tower_layers=(3,)), retrieval, schema, TABLES, "fp32")
    task = TrainTask(Recommender(Lookup(meta_collections(TABLES, schema), schema), tower), objective_of(tasks, retrieval))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    batch = random_batch(40, 3, torch.float32)
    task.start_at_label_means(batch)
    moved = {name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"task_outputs.bias_GO"} | ({"affinity_bias"} if retrieval else set())
    with torch.no_grad():
        tower.task_outputs.weight_GIO.zero_()
        predictions_BT = task.objective.eval()(tower(random_vectors(40, torch.float32), batch.dense_BD), batch)[1]
    click, buy, log_seconds = naive_means(batch)
    expected = torch.tensor([click, buy, torch.expm1(torch.tensor(log_seconds)).item()])
    torch.testing.assert_close(predictions_BT, expected.expand(40, 3), rtol=1e-5, atol=1e-6)
