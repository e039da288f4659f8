"""Sharded training equals a plain model on one process: every sharding type, one rank and two."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.ranks import run_on_ranks
from tests.runs import local_values, make_loader, train_few
from tests.small import write_log
from triptych.datasets.loader import Loader
from triptych.datasets.schema import SIDES, Feature
from triptych.embeddings.lookup import ALONE
from triptych.embeddings.optimizer import TableTraining
from triptych.embeddings.tables import EmbeddingTable, fill_table, is_sequence_table
from triptych.launch.build import model_state, train_task
from triptych.launch.config import Recipe, load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.inference import predict_rows
from triptych.launch.schedule import lr_factor
from triptych.mmoe.train_task import Objective

STEPS = 5
GLOBAL_BATCH = 128
TOLERANCE = 1e-6
MIXED = {"user": "row_wise", "item": "table_wise", "words": "data_parallel"}
ADAGRAD = "train.embedding_optimizer=adagrad"
# Two tables of different widths.
ATTENTION = [
    *("features.seen.pooling=attention", "features.seen.positions=true"),
    *("features.bought.pooling=attention", "features.bought.target=user"),
]
VARIANTS = {
    "rowwise_adagrad": [],
    # Element-wise Adagrad begins with lr * sign(g), which amplifies the rounding of a g that nearly cancels; an eps of g's size does not.
    "adagrad": [ADAGRAD, "train.embedding_eps=0.01"],
    "sgd": ["train.embedding_optimizer=sgd"],
    "weight_decay": ["train.embedding_weight_decay=0.1", "tables.item.weight_decay=0.0"],
    "rates": ["tables.item.lr=0.03", "train.schedule=linear", "train.warmup_steps=3", "train.final_lr=0.1"],
    "attention": ATTENTION,
    "attention_adagrad": [*ATTENTION, ADAGRAD, "train.embedding_eps=0.01"],
}
CASES = {
    "mixed": ("mixed", "rowwise_adagrad"),
    "table_wise": ("table_wise", "rowwise_adagrad"),
    "row_wise": ("row_wise", "rowwise_adagrad"),
    "table_row_wise": ("table_row_wise", "rowwise_adagrad"),
    "data_parallel": ("data_parallel", "rowwise_adagrad"),
    "column_wise": ("column_wise", "adagrad"),
    "table_wise_sgd": ("table_wise", "sgd"),
    "row_wise_adagrad": ("row_wise", "adagrad"),
    "decayed": ("row_wise", "weight_decay"),
    "rates": ("table_wise", "rates"),
    "replicated_rates": ("data_parallel", "rates"),
    "attention_table_wise": ("table_wise", "attention"),
    "attention_row_wise": ("row_wise", "attention"),
    "attention_column_wise": ("column_wise", "attention_adagrad"),
}


def recipe_for(path: Path, case: str, world_size: int = 1) -> Recipe:
    sharding, variant = CASES[case]
    tables = [f"tables.{table}.sharding={kind if sharding == 'mixed' else sharding}" for table, kind in MIXED.items()]
    common = ["train.embedding_lr=0.1", f"data.batch_size={GLOBAL_BATCH // world_size}"]
    return load_recipe(path, [*tables, *common, *VARIANTS[variant]])


class PlainTables(nn.Module):
    """The lookup as nn.EmbeddingBag, one bag a table, dense gradients."""

    def __init__(self, recipe: Recipe, attention: nn.ModuleDict) -> None:
        super().__init__()
        self.schema, self.attention = recipe.data_schema, attention
        self.bags = nn.ModuleDict({t.name: nn.EmbeddingBag(t.rows, t.dim, mode="mean") for t in recipe.tables})
        for table in recipe.tables:
            fill_table(self.bags[table.name].weight.data, table, recipe.train.seed)

    def pooled(self, feature: Feature, ids: Any, *, alone: bool) -> torch.Tensor:
        weight, jagged = self.bags[feature.table].weight, ids[feature.name]
        if feature.pooling == "attention" and not alone:
            target = self.pooled(self.schema.target(feature), ids, alone=True)
            return self.attention[f"list_{feature.name}"](target, weight[jagged.values()], jagged.lengths())
        mode = "mean" if feature.pooling == "attention" else feature.pooling
        return nn.functional.embedding_bag(jagged.values(), weight, jagged.offsets()[:-1], mode=mode)

    def forward(self, ids: Any) -> dict[str, torch.Tensor]:
        vectors = {}
        for side in SIDES:
            features = [f for f in self.schema.features if f.is_id and f.side == side]
            for key, alone in ((side, False), (side + ALONE, True)):
                vectors[key] = torch.cat([self.pooled(feature, ids, alone=alone) for feature in features], dim=1)
        return vectors


@torch.no_grad()
def update_table(weight: nn.Parameter, state: dict[str, torch.Tensor], training: TableTraining, table: EmbeddingTable, lr: float) -> None:
    """Row-wise Adagrad, Adagrad or SGD, by their definitions; weight decay on the rows that the step looked up."""
    looked_up = (weight.grad != 0).any(1, keepdim=True)
    gradient = weight.grad + torch.where(looked_up, training.weight_decay_of(table) * weight, 0.0)
    if training.optimizer == "sgd":
        weight -= lr * gradient
        return
    square = gradient.square().mean(1, keepdim=True) if training.optimizer == "rowwise_adagrad" else gradient.square()
    state["sum"] = state.get("sum", torch.zeros_like(square)) + square
    weight -= lr * gradient / (state["sum"].sqrt() + training.eps)


@functools.cache
def plain_training(path: Path, variant: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Weights after STEPS steps of a plain model, and its predictions on `valid` in row order."""
    recipe = recipe_for(path, next(name for name, (_, its) in CASES.items() if its == variant))
    training, dense = recipe.train.table_training, train_task(recipe)
    tower, objective, lookup = dense.model.tower, dense.objective, dense.model.lookup
    attention = lookup.sequence_pooling.attention if lookup.embeddings else nn.ModuleDict()
    tables = PlainTables(recipe, attention)
    adam = torch.optim.AdamW([*tower.parameters(), *attention.parameters()], weight_decay=recipe.train.weight_decay)
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in tables.bags}
    for step, batch in enumerate(make_loader(recipe, 0, 1).batches(steps=STEPS)):
        tables.zero_grad()
        adam.zero_grad()
        loss, _ = objective(tower(tables(batch.ids), batch.dense_BD), batch)
        loss.backward()
        factor = lr_factor(recipe.train, step, STEPS)
        for table in recipe.tables:
            update_table(tables.bags[table.name].weight, states[table.name], training, table, factor * training.lr_of(table))
        adam.param_groups[0]["lr"] = factor * recipe.train.lr
        adam.step()
    weights = {}
    for name, bag in tables.bags.items():
        widths = sorted({t.dim for t in recipe.tables if is_sequence_table(t.name, recipe.data_schema)})
        holder = "embedding_bags.embedding_bags"
        if is_sequence_table(name, recipe.data_schema):
            holder = f"embeddings.{widths.index(bag.embedding_dim)}.embeddings"
        weights[f"model/model.lookup.{holder}.table_{name}.weight"] = bag.weight.detach()
    weights |= {f"model/model.tower.{name}": value.detach() for name, value in tower.state_dict().items()}
    weights |= {f"model/model.lookup.sequence_pooling.attention.{name}": v.detach() for name, v in attention.state_dict().items()}
    return weights, plain_predictions(tables, tower, objective, make_loader(recipe, 0, 1, "valid"))


@torch.no_grad()
def plain_predictions(tables: nn.Module, tower: nn.Module, objective: Objective, loader: Loader) -> np.ndarray:
    objective.eval()
    predictions = [objective(tower(tables(batch.ids), batch.dense_BD), batch)[1] for batch in loader.batches()]
    return torch.cat(predictions).numpy()


def sharded_training(ranks: Ranks, path: Path, cases: list[str]) -> dict[str, Any]:
    """For each case: this rank's parts of the weights after STEPS steps, and the first rank's predictions."""
    results = {}
    for case in cases:
        recipe = recipe_for(path, case, ranks.world_size)
        built = train_few(recipe, ranks, STEPS)
        parts = local_values(model_state(built))
        predictions = predict_rows(built, make_loader(recipe, ranks.rank, ranks.world_size, "valid"), ranks)
        kinds = {table: facts["sharding"] for table, facts in built.plan.described()["tables"].items()}
        results[case] = (kinds, parts, None if predictions is None else predictions.prediction_NT)
    return results


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request: pytest.FixtureRequest, log: Path) -> list[dict[str, Any]]:
    return run_on_ranks(request.param, sharded_training, log, list(CASES))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", list(CASES))
def test_sharded_training_equals_plain_training(case: str, trained: list[dict[str, Any]], log: Path) -> None:
    sharding, variant = CASES[case]
    expected, expected_predictions = plain_training(log, variant)
    covered = {name: torch.zeros(value.shape, dtype=torch.int64) for name, value in expected.items()}
    for rank_result in trained:
        kinds, parts, _ = rank_result[case]
        assert kinds == MIXED if sharding == "mixed" else set(kinds.values()) == {sharding}
        for name, value in expected.items():
            for offsets, tensor in parts[name]:
                place = tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))
                assert relative_error(tensor, value[place]) <= TOLERANCE, name
                covered[name][place] += 1
    assert all((count > 0).all() for count in covered.values())
    predictions = torch.from_numpy(trained[0][case][2])
    assert relative_error(predictions, torch.from_numpy(expected_predictions)) <= TOLERANCE


def test_training_moves_every_weight(log: Path) -> None:
    """Without this, equal weights could mean that nothing was trained."""
    trained, _ = plain_training(log, "rowwise_adagrad")
    fresh = train_task(recipe_for(log, "table_wise")).model.tower.state_dict()
    moved = [name for name in fresh if not torch.equal(fresh[name], trained[f"model/model.tower.{name}"])]
    assert set(moved) == set(fresh)
