"""Sharded training equals a plain model on one process: every sharding type, one rank and two."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.ranks import run_on_ranks
from tests.small import write_log
from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import SIDES, Feature
from triptych.embeddings.tables import fill_table
from triptych.launch.build import build, model_state, train_task
from triptych.launch.config import Recipe, load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.inference import predict_rows
from triptych.mmoe.train_task import Objective

STEPS = 5
GLOBAL_BATCH = 128
TOLERANCE = 1e-6
MIXED = {"user": "row_wise", "item": "table_wise", "words": "data_parallel"}
CASES = {
    "mixed": ("mixed", "rowwise_adagrad"),
    "table_wise": ("table_wise", "rowwise_adagrad"),
    "row_wise": ("row_wise", "rowwise_adagrad"),
    "data_parallel": ("data_parallel", "rowwise_adagrad"),
    "column_wise": ("column_wise", "adagrad"),
    "table_wise_sgd": ("table_wise", "sgd"),
    "row_wise_adagrad": ("row_wise", "adagrad"),
}


def recipe_for(path: Path, case: str, world_size: int = 1) -> Recipe:
    sharding, optimizer = CASES[case]
    tables = [f"tables.{table}.sharding={kind if sharding == 'mixed' else sharding}" for table, kind in MIXED.items()]
    # Element-wise Adagrad begins with lr * sign(g), which amplifies the rounding of a g that nearly cancels; an eps of g's size does not.
    common = [
        "train.embedding_lr=0.1",
        f"train.embedding_eps={1e-2 if optimizer == 'adagrad' else 1e-8}",
        f"data.batch_size={GLOBAL_BATCH // world_size}",
    ]
    return load_recipe(path, [*tables, *common, f"train.embedding_optimizer={optimizer}"])


def make_loader(recipe: Recipe, rank: int, world_size: int, split: str = "train") -> Loader:
    schema = recipe.data_schema
    return Loader(
        Decoder(schema, Fitted()),
        list_slices(schema, [f"{recipe.data.root}/{split}.parquet"], labels=True).slices,
        rank=rank,
        world_size=world_size,
        seed=recipe.train.seed,
        shuffle=split == "train",
        window=3 if split == "train" else 1,
    )


class PlainTables(nn.Module):
    """The lookup as nn.EmbeddingBag, one bag a table, dense gradients."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.schema = recipe.data_schema
        self.bags = nn.ModuleDict({t.name: nn.EmbeddingBag(t.rows, t.dim, mode="mean") for t in recipe.tables})
        for table in recipe.tables:
            fill_table(self.bags[table.name].weight.data, table, recipe.train.seed)

    def pooled(self, feature: Feature, jagged: Any) -> torch.Tensor:
        weight = self.bags[feature.table].weight
        return nn.functional.embedding_bag(jagged.values(), weight, jagged.offsets()[:-1], mode=feature.pooling)

    def forward(self, ids: Any) -> dict[str, torch.Tensor]:
        vectors: dict[str, list[torch.Tensor]] = {}
        for feature in self.schema.features:
            if feature.is_id:
                jagged = ids[feature.name]
                vectors.setdefault(feature.side, []).append(self.pooled(feature, jagged))
        return {side: torch.cat(vectors[side], dim=1) for side in SIDES if side in vectors}


@torch.no_grad()
def update_table(weight: nn.Parameter, state: dict[str, torch.Tensor], optimizer: str, lr: float, eps: float) -> None:
    """Row-wise Adagrad, Adagrad or SGD, by their definitions."""
    gradient = weight.grad
    if optimizer == "sgd":
        weight -= lr * gradient
        return
    square = gradient.square().mean(1, keepdim=True) if optimizer == "rowwise_adagrad" else gradient.square()
    state["sum"] = state.get("sum", torch.zeros_like(square)) + square
    weight -= lr * gradient / (state["sum"].sqrt() + eps)


@functools.cache
def plain_training(path: Path, optimizer: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Weights after STEPS steps of a plain model, and its predictions on `valid` in row order."""
    case = next(name for name, (_, its) in CASES.items() if its == optimizer)
    recipe = recipe_for(path, case)
    dense = train_task(recipe)
    tables, tower, objective = PlainTables(recipe), dense.model.tower, dense.objective
    adam = torch.optim.AdamW([*tower.parameters()], lr=recipe.train.lr, weight_decay=recipe.train.weight_decay)
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in tables.bags}
    for batch in make_loader(recipe, 0, 1).batches(steps=STEPS):
        tables.zero_grad()
        adam.zero_grad()
        loss, _ = objective(tower(tables(batch.ids), batch.dense_BD), batch)
        loss.backward()
        for name, bag in tables.bags.items():
            update_table(bag.weight, states[name], optimizer, recipe.train.embedding_lr, recipe.train.embedding_eps)
        adam.step()
    weights = {
        f"model/model.lookup.embedding_bags.embedding_bags.table_{name}.weight": bag.weight.detach() for name, bag in tables.bags.items()
    }
    weights |= {f"model/model.tower.{name}": value.detach() for name, value in tower.state_dict().items()}
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
        built = build(recipe, ranks)
        pipeline = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device)
        batches = make_loader(recipe, ranks.rank, ranks.world_size).batches(steps=STEPS)
        for _ in range(STEPS):
            pipeline.progress(batches)
        pipeline.detach()
        parts = {}
        for name, value in model_state(built).items():
            shards = (
                [(s.metadata.shard_offsets, s.tensor.clone()) for s in value.local_shards()] if hasattr(value, "local_shards") else None
            )
            parts[name] = shards if shards is not None else [([0] * value.dim(), value.detach().clone())]
        predictions = predict_rows(built.model, make_loader(recipe, ranks.rank, ranks.world_size, "valid"), ranks)
        kinds = {table: facts["sharding"] for table, facts in built.plan().items()}
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
    sharding, optimizer = CASES[case]
    expected, expected_predictions = plain_training(log, optimizer)
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
