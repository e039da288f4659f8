"""Clipped training equals a plain loop in float64 that clips the gradient of every single lookup, on any plan and number of ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_on_ranks
from tests.runs import local_values, make_loader, train_few
from tests.small import write_log
from triptych.datasets.schema import SIDES, Feature
from triptych.embeddings.lookup import ALONE
from triptych.embeddings.sharding import of_table
from triptych.embeddings.tables import fill_table
from triptych.launch.build import model_state, train_task
from triptych.launch.config import Recipe, load_recipe
from triptych.launch.distributed import Ranks

STEPS, GLOBAL_BATCH = 4, 128
TOLERANCE = 2e-5
"""Relative to the norm of a weight's change: float32 against float64."""
EMBEDDING_CLIP, CLIP = 0.015, 0.75
MIXED = {"user": "row_wise", "item": "table_wise", "words": "data_parallel"}
ATTENTION = ["features.seen.pooling=attention"]
CASES = {
    "table_wise": ("table_wise", []),
    "row_wise": ("row_wise", []),
    "column_wise": ("column_wise", []),
    "data_parallel": ("data_parallel", []),
    "mixed": ("mixed", []),
    "attention_row_wise": ("row_wise", ATTENTION),
    "attention_mixed": ("mixed", ATTENTION),
}


def recipe_for(path: Path, case: str, world_size: int) -> Recipe:
    sharding, more = CASES[case]
    plan = [f"tables.{table}.sharding={kind if sharding == 'mixed' else sharding}" for table, kind in MIXED.items()]
    clips = [f"train.clip_norm={CLIP}", f"train.embedding_clip_norm={EMBEDDING_CLIP}"]
    rates = ["train.embedding_optimizer=sgd", "train.embedding_lr=2.0", f"data.batch_size={GLOBAL_BATCH // world_size}"]
    return load_recipe(path, [*plan, *clips, *rates, *more])


class Lookups:
    """Vectors of one step, a leaf each, so that each lookup has a gradient of its own."""

    def __init__(self, recipe: Recipe, weights: dict[str, torch.Tensor], attention: nn.ModuleDict, ids: Any) -> None:
        self.schema, self.attention, self.ids = recipe.data_schema, attention, ids
        self.leaves = {f.name: weights[f.table][ids[f.name].values()].requires_grad_() for f in self.schema.features if f.is_id}

    def pooled(self, feature: Feature, *, alone: bool) -> torch.Tensor:
        leaf, lengths = self.leaves[feature.name], self.ids[feature.name].lengths().tolist()
        if feature.pooling == "attention" and not alone:
            target = self.pooled(self.schema.target(feature), alone=True)
            return self.attention[f"list_{feature.name}"](target, leaf, self.ids[feature.name].lengths())
        by_sum = feature.kind == "id" or feature.pooling == "sum"
        return torch.stack([part.sum(0) / (1 if by_sum else max(len(part), 1)) for part in leaf.split(lengths)])

    def vectors(self) -> dict[str, torch.Tensor]:
        sides = {side: [f for f in self.schema.features if f.is_id and f.side == side] for side in SIDES}
        keys = dict.fromkeys(SIDES, False) | {side + ALONE: True for side in SIDES}
        return {key: torch.cat([self.pooled(f, alone=a) for f in sides[key.removesuffix(ALONE)]], 1) for key, a in keys.items()}

    def clipped(self, weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[bool]]:
        """Gradients of the tables, and of which lookups they were clipped."""
        gradients, was_clipped = {table: torch.zeros_like(weight) for table, weight in weights.items()}, []
        for feature in self.schema.features:
            if feature.is_id:
                for row, gradient in zip(self.ids[feature.name].values().tolist(), self.leaves[feature.name].grad, strict=True):
                    # The loss is a mean over the rows of the batch.
                    norm = float(gradient.norm()) * GLOBAL_BATCH
                    gradients[feature.table][row] += gradient * min(1.0, EMBEDDING_CLIP / norm if norm else 1.0)
                    was_clipped.append(norm > EMBEDDING_CLIP)
        return gradients, was_clipped


def clip_dense(parameters: list[nn.Parameter]) -> bool:
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    for parameter in parameters:
        parameter.grad *= min(1.0, CLIP / float(norm))
    return bool(norm > CLIP)


@functools.cache
def plain_training(path: Path, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after STEPS steps in float64."""
    recipe = recipe_for(path, case, 1)
    model = train_task(recipe)
    lookup, tower, objective = model.model.lookup, model.model.tower.double(), model.objective
    attention = (lookup.sequence_pooling.attention if lookup.embeddings else nn.ModuleDict()).double()
    weights = {table.name: torch.zeros(table.rows, table.dim) for table in recipe.tables}
    for table in recipe.tables:
        fill_table(weights[table.name], table, recipe.train.seed)
    weights = {name: weight.double() for name, weight in weights.items()}
    dense = {f"tower.{name}": p for name, p in tower.named_parameters()} | {
        f"attention.{name}": p for name, p in attention.named_parameters()
    }
    before = {name: value.detach().clone() for name, value in (weights | dense).items()}
    adam = torch.optim.AdamW(dense.values(), lr=recipe.train.lr, weight_decay=recipe.train.weight_decay)
    lookups_clipped, steps_clipped = [], []
    for batch in make_loader(recipe, 0, 1).batches(steps=STEPS):
        lookups = Lookups(recipe, weights, attention, batch.ids)
        loss, _ = objective(tower(lookups.vectors(), batch.dense_BD.double()), batch)
        adam.zero_grad()
        loss.backward()
        gradients, was_clipped = lookups.clipped(weights)
        for name, gradient in gradients.items():
            weights[name] -= recipe.train.embedding_lr * gradient
        lookups_clipped += was_clipped
        steps_clipped.append(clip_dense(list(dense.values())))
        adam.step()
    # A bound that always or never binds would hide a wrong one.
    share = sum(lookups_clipped) / len(lookups_clipped)
    assert 0.1 < share < 0.9 and any(steps_clipped) and not all(steps_clipped), (share, steps_clipped)
    return before, {name: value.detach().clone() for name, value in (weights | dense).items()}


def sharded_training(ranks: Ranks, path: Path) -> dict[str, Any]:
    results = {}
    for case in CASES:
        recipe = recipe_for(path, case, ranks.world_size)
        built = train_few(recipe, ranks, STEPS)
        results[case] = local_values(model_state(built))
        assert int(built.task.model.lookup.guard.zeroed) == 0
    return results


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request: pytest.FixtureRequest, log: Path) -> list[dict[str, Any]]:
    return run_on_ranks(request.param, sharded_training, log)


def plain_name(name: str) -> str | None:
    """A sharded model's name of a weight -> the plain one's."""
    if (table := of_table(name)) is not None:
        return table
    return next((part + name.partition(f".{part}")[2] for part in ("tower.", "attention.") if f".{part}" in name), None)


@pytest.mark.parametrize("case", list(CASES))
def test_clipped_training_equals_a_loop_over_lookups(case: str, trained: list[dict[str, Any]], log: Path) -> None:
    before, after = plain_training(log, "attention_row_wise" if ATTENTION in CASES[case] else "table_wise")
    seen = set()
    for result in trained:
        for name, parts in result[case].items():
            plain = plain_name(name)
            if plain not in after:
                assert "smearing" in name, name
                continue
            seen.add(plain)
            for offsets, tensor in parts:
                place = tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))
                change = (after[plain] - before[plain]).norm()
                assert (tensor.double() - after[plain][place]).norm() <= TOLERANCE * change + 1e-7 * after[plain].norm(), name
    assert seen == after.keys()
