"""Any plan, any number of ranks: the same checkpoint finds the same rows and predicts the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.random_recipes import KINDS, Sharding, World, covering, dealt, every_id, global_batch, plans_of, random_recipe, traits, with_plan
from tests.ranks import run_on_ranks
from tests.runs import save
from triptych.datasets.batch import Batch
from triptych.datasets.schema import SIDES, Schema
from triptych.embeddings.lookup import ALONE, alone
from triptych.embeddings.plan import describe
from triptych.embeddings.tables import initial_rows
from triptych.launch.build import Built, build, load_model, load_optimizers, model_state, optimizer_state, train_task
from triptych.launch.checkpoints.manifest import step_name
from triptych.launch.checkpoints.parts import State, local_parts
from triptych.launch.checkpoints.reader import Reader
from triptych.launch.config import Recipe
from triptych.launch.distributed import Ranks

EXACT = {"table_wise", "column_wise"}
"""They sum each vector's elements on one rank, in the order of the list; row-wise ranks sum parts of it."""
TOLERANCE = 1e-6
"""Norm of the difference, relative to the norm: of a feature's vectors, or a task's predictions, over all rows."""
STEPS, STEP_ROWS, ROWS = 4, 32, 37
TIMEOUT = 900.0
ONE = World(1, 1)


class Seen(NamedTuple):
    """What a model makes of a global batch, in the order of its rows."""

    kinds: Sharding
    """How the plan shards each table."""
    rows: dict[str, torch.Tensor]
    """Rows of the batch's ids, by feature."""
    every_row: list[torch.Tensor]
    """Rows of every id that there is, as each rank finds them."""
    vectors: dict[str, torch.Tensor]
    """[N, dim] that the lookup gives of each feature; lists with attention also without it, as `name_alone`."""
    predictions_NT: torch.Tensor


def by_feature(vectors: dict[str, torch.Tensor], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Each side's vectors, cut in recipe order."""
    dims = {t.name: t.dim for t in recipe.tables}
    found: dict[str, torch.Tensor] = {}
    for side in SIDES:
        features = [f for f in recipe.data_schema.features if f.is_id and f.side == side]
        widths = [dims[str(f.table)] for f in features]
        for key, names in ((side, [f.name for f in features]), (side + ALONE, [alone(f) for f in features])):
            if key in vectors:
                found |= dict(zip(names, vectors[key].split(widths, dim=1), strict=True))
    return found


@torch.no_grad()
def look(built: Built, recipe: Recipe, ranks: Ranks, batch: Batch) -> Seen | None:
    """Deal a global batch to the ranks, predict it, and put the first rank's answer together. Collective."""
    built.model.eval()
    own = built.found(dealt(batch, ranks.rank, ranks.world_size))
    real = own.row_B >= 0
    vectors = by_feature(built.task.model.lookup(own.ids), recipe)
    parts = ranks.gather(
        (
            {name: own.ids[name].values() for name in recipe.data_schema.id_feature_names},
            built.found(every_id(recipe)).ids.values(),
            {name: vector_BD[real] for name, vector_BD in vectors.items()},
            built.model(own)[1][real],
        )
    )
    if not ranks.is_first:
        return None
    rows, every_row, vectors_of_ranks, predictions = zip(*parts, strict=True)
    return Seen(
        {table: facts["sharding"] for table, facts in describe(built.plan.sharding).items()},
        {name: torch.cat([part[name] for part in rows]) for name in rows[0]},
        list(every_row),
        {name: torch.cat([part[name] for part in vectors_of_ranks]) for name in vectors},
        torch.cat(predictions),
    )


def train(ranks: Ranks, recipe: Recipe) -> Built:
    """A few steps, so that no weight is what it was at first."""
    built = build(with_plan(recipe, {t.name: "table_wise" for t in recipe.tables}), ranks)
    batches: Iterator[Batch] = (global_batch(recipe, seed, STEP_ROWS) for seed in range(STEPS))
    if built.dynamic is not None:
        batches = built.dynamic.learned(batches)
    pipeline = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device)
    for _ in range(STEPS):
        pipeline.progress(batches)
        if built.dynamic is not None:
            built.dynamic.after_step()
    pipeline.detach()
    return built


def whole_state(built: Built) -> State:
    return {**model_state(built), **optimizer_state(built)}


def assert_holds(built: Built, reader: Reader, ranks: Ranks) -> None:
    """Weights and optimizer state are the checkpoint's, bit for bit, and no part of it is missing."""
    state = whole_state(built)
    assert set().union(*ranks.all_gather(set(state))) == reader.names()  # a rank may hold nothing of a table
    for name, value in state.items():
        whole = reader.read(name)
        for part in local_parts(value):
            region = tuple(slice(begin, end) for begin, end in zip(part.offsets, part.ends, strict=True))
            assert torch.equal(part.tensor, whole[region]), name


def number_of(world: World) -> int:
    """The step that names its checkpoint."""
    return 10 * world.num_ranks + world.on_a_node


def train_and_look(ranks: Ranks, folder: Path, recipes: list[Recipe], mixes: int) -> tuple[list[Seen | None], list[Seen | None]]:
    """Train each recipe on one rank, leave the checkpoint of step 0, and predict; then as `load_and_look`."""
    seen = []
    for recipe in recipes:
        built = train(ranks, recipe)
        save(ranks, folder / f"{recipe.train.seed}" / step_name(0), whole_state(built))
        seen.append(look(built, recipe, ranks, global_batch(recipe, STEPS, ROWS)))
    return seen, load_and_look(ranks, ONE, folder, recipes, mixes, 0)


def load_and_look(ranks: Ranks, world: World, folder: Path, recipes: list[Recipe], mixes: int, then: int) -> list[Seen | None]:
    """Predict with the checkpoint of step `then` under every plan of each recipe; the last plan leaves a checkpoint that holds the same."""
    ranks = replace(ranks, local_rank=ranks.rank % world.on_a_node, local_world_size=world.on_a_node)
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks.local_world_size), "LOCAL_RANK": str(ranks.local_rank)}  # TorchRec finds nodes so
    seen = []
    for recipe in recipes:
        checkpoints, batch = folder / f"{recipe.train.seed}", global_batch(recipe, STEPS, ROWS)
        reader = Reader(checkpoints / step_name(then))
        for plan in plans_of(recipe, world, mixes):
            try:
                built = build(with_plan(recipe, plan), ranks)
                load_model(built, reader)
                load_optimizers(built, reader)
                assert_holds(built, reader, ranks)
                seen.append(look(built, recipe, ranks, batch))
            except Exception as error:
                raise AssertionError(f"recipe {recipe.train.seed}, plan {plan}, {world}") from error
            if built.dynamic is not None and built.dynamic.ids.group is not None:
                dist.destroy_process_group(built.dynamic.ids.group)
        save(ranks, checkpoints / step_name(number_of(world)), whole_state(built))
        again = Reader(checkpoints / step_name(number_of(world)))
        assert again.names() == reader.names()
        assert all(torch.equal(again.read(name), reader.read(name)) for name in reader.names()), f"recipe {recipe.train.seed}"
    return seen


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


class Comparison:
    """What differs between plans, and by how much."""

    def __init__(self) -> None:
        self.num_plans, self.num_exact, self.num_exact_predictions = 0, 0, 0
        self.worst_vectors, self.worst_predictions = dict.fromkeys(KINDS, 0.0), 0.0
        self.wrong: list[str] = []

    def add(self, where: str, schema: Schema, seen: Seen, expected: Seen) -> None:
        self.num_plans += 1
        self._expect(where, "rows", all(torch.equal(rows, expected.rows[name]) for name, rows in seen.rows.items()))
        self._expect(where, "rows of every id", all(torch.equal(rows, expected.every_row[0]) for rows in seen.every_row))
        self._expect(where, "features", list(seen.vectors) == list(expected.vectors) and seen.rows.keys() == expected.rows.keys())
        # Attention is a product of matrices, which rounds otherwise for another number of vectors.
        attention = {f.name for f in schema.features if f.pooling == "attention"}
        for name, vector_ND in seen.vectors.items():
            kind = seen.kinds[str(schema.feature(name.removesuffix(ALONE)).table)]
            error = error_of(vector_ND, expected.vectors[name])
            self.worst_vectors[kind] = max(self.worst_vectors[kind], error)
            self._expect(where, f"vectors of {name}, {kind}, by {error:.1e}", error <= TOLERANCE)
            if kind in EXACT and name not in attention:
                self.num_exact += 1
                self._expect(where, f"bits of {name}, {kind}", torch.equal(vector_ND, expected.vectors[name]))
        for prediction_N, expected_N in zip(seen.predictions_NT.T, expected.predictions_NT.T, strict=True):
            error = error_of(prediction_N, expected_N)
            self.worst_predictions = max(self.worst_predictions, error)
            self._expect(where, f"predictions, by {error:.1e}", error <= TOLERANCE)
        self.num_exact_predictions += torch.equal(seen.predictions_NT, expected.predictions_NT)

    def _expect(self, where: str, what: str, same: bool) -> None:
        if not same:
            self.wrong.append(f"{where}: other {what}")

    def __str__(self) -> str:
        return (
            f"{self.num_plans} recipes, plans and numbers of ranks; relative errors at most: {self.worst_predictions:.1e} of predictions, "
            f"of vectors {self.worst_vectors}; bit for bit {self.num_exact} features, {self.num_exact_predictions} predictions"
        )


def compare(recipes: list[Recipe], worlds: Sequence[World], mixes: int, folder: Path) -> Comparison:
    """Train on one rank and try its plans; then the ranks of each world read what those of the world before it wrote."""
    expected, seen = run_on_ranks(1, train_and_look, folder, recipes, mixes, timeout=TIMEOUT)[0]
    seen_in = {ONE: seen}
    for then, world in pairwise([ONE, *worlds]):
        seen_in[world] = run_on_ranks(world.num_ranks, load_and_look, world, folder, recipes, mixes, number_of(then), timeout=TIMEOUT)[0]
    comparison = Comparison()
    for world, seen in seen_in.items():
        cases = [
            (recipe, before, plan) for recipe, before in zip(recipes, expected, strict=True) for plan in plans_of(recipe, world, mixes)
        ]
        for (recipe, before, plan), after in zip(cases, seen, strict=True):
            comparison.add(f"recipe {recipe.train.seed}, {world}, {plan}", recipe.data_schema, after, before)
            assert all(kind in ("auto", after.kinds[table]) for table, kind in plan.items()), (world, plan, after.kinds)
    return comparison


def check(num_recipes: int, worlds: Sequence[World], mixes: int, folder: Path) -> None:
    candidates = [random_recipe(seed) for seed in range(40)]
    recipes = covering(candidates, num_recipes)
    comparison = compare(recipes, worlds, mixes, folder)
    print(comparison)
    assert not comparison.wrong, "\n".join([str(comparison), f"{len(comparison.wrong)} differences", *comparison.wrong[:20]])
    assert comparison.num_exact > 0 and set().union(*map(traits, recipes)) == set().union(*map(traits, candidates))


def test_any_plan_predicts_the_same(tmp_path: Path) -> None:
    check(5, [World(2, 2), World(4, 2)], 1, tmp_path)


@pytest.mark.long
def test_any_plan_of_many_models_predicts_the_same(tmp_path: Path) -> None:
    check(40, [World(2, 1), World(3, 3), World(4, 2)], 2, tmp_path)


def fixed_recipe(sharding: str, comms: str = "fp32", *, attention: bool = False) -> Recipe:
    """Tables that take turns in the features, and so in the recipe's order, but not in a plan's."""
    features = [("a", "item", "first"), ("b", "user", "second"), ("c", "user", "first"), ("d", "item", "third"), ("e", "user", "second")]
    pooling = {"c": {"kind": "ids", "pooling": "attention" if attention else "sum"}, "d": {"kind": "ids", "pooling": "sum"}}
    return Recipe.model_validate(
        {
            "data": {"root": "."},
            "tables": [{"name": n, "rows": 50, "dim": 8, "init": 0.3, "sharding": sharding} for n in ("first", "second", "third")],
            "features": [{"name": n, "side": side, "table": table, **pooling.get(n, {"kind": "id"})} for n, side, table in features],
            "tasks": [{"name": "click", "kind": "binary", "label": "click"}],
            "model": {"sharing": "shared_bottom", "expert_layers": [16], "tower_layers": [8]},
            "train": {"comms": comms},
        }
    )


SHARDINGS, COMMS = ("table_wise", "row_wise"), ("fp32", "fp16")


class PlanOrder(NamedTuple):
    """What a collection of tables gives, on one rank."""

    names: list[str]
    """Of the features, in the order of its columns."""
    vectors: torch.Tensor
    """[B, sum of dims]: all columns, as they come."""
    predictions_BT: torch.Tensor
    """Of a model that takes the columns as they come."""


@torch.no_grad()
def look_in_plan_order(built: Built, own: Batch) -> PlanOrder:
    model, keyed = built.task.model, built.task.model.lookup.embedding_bags(own.ids)
    sides = model.lookup(own.ids)
    as_they_come = dict(zip(sides, keyed.values().split([v.shape[1] for v in sides.values()], dim=1), strict=True))
    return PlanOrder(list(keyed.keys()), keyed.values(), built.task.objective(model.tower(as_they_come, own.dense_BD), own)[1])


def look_at_fixed_recipes(ranks: Ranks) -> tuple[Seen | None, PlanOrder, dict[tuple[str, str], Seen | None]]:
    recipe = fixed_recipe("table_wise")
    built, batch = build(recipe, ranks), global_batch(recipe, 0, ROWS)
    seen = look(built, recipe, ranks, batch)
    in_plan_order = look_in_plan_order(built, dealt(batch, ranks.rank, ranks.world_size))
    by_comms = {}
    for sharding, comms in product(SHARDINGS, COMMS):
        recipe = fixed_recipe(sharding, comms, attention=True)
        by_comms[sharding, comms] = look(build(recipe, ranks), recipe, ranks, global_batch(recipe, 0, ROWS))
    return seen, in_plan_order, by_comms


@pytest.fixture(scope="module")
def on_two_ranks() -> list[tuple[Seen, PlanOrder, dict[tuple[str, str], Seen]]]:
    return run_on_ranks(2, look_at_fixed_recipes)


@torch.no_grad()
def plain_look(recipe: Recipe) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """{feature: [N, dim]} in recipe order, and predictions, by plain PyTorch, on one process and without a plan."""
    task, schema, batch = train_task(recipe).eval(), recipe.data_schema, global_batch(recipe, 0, ROWS)
    weights, vectors = {t.name: initial_rows(t, recipe.train.seed, 0) for t in recipe.tables}, {}
    for feature in (f for side in SIDES for f in schema.features if f.side == side):
        ids = batch.ids[feature.name]
        vectors[feature.name] = embedding_bag(ids.values(), weights[feature.table], ids.offsets()[:-1], mode="sum")
    sides = {side: [vectors[f.name] for f in schema.features if f.side == side] for side in SIDES}
    outputs = task.model.tower({side: torch.cat(parts, dim=1) for side, parts in sides.items() if parts}, batch.dense_BD)
    return vectors, task.objective(outputs, batch)[1]


def test_columns_come_in_plan_order_and_are_fed_in_recipe_order(on_two_ranks: list[Any]) -> None:
    """The plan's order is another one here, and a model that takes it predicts something else."""
    vectors, predictions_NT = plain_look(fixed_recipe("table_wise"))
    seen, parts = on_two_ranks[0][0], [part for _, part, _ in on_two_ranks]
    assert list(seen.vectors) == list(vectors)
    assert all(error_of(seen.vectors[name], vectors[name]) <= TOLERANCE for name in vectors)
    assert error_of(seen.predictions_NT, predictions_NT) <= TOLERANCE

    names, as_they_come = parts[0].names, torch.cat([part.vectors for part in parts])[:ROWS]
    assert sorted(names) == sorted(vectors) and names != list(vectors)
    assert error_of(as_they_come, torch.cat([vectors[name] for name in names], dim=1)) <= TOLERANCE
    assert error_of(as_they_come, torch.cat(list(vectors.values()), dim=1)) > 0.5
    assert error_of(torch.cat([part.predictions_BT for part in parts])[:ROWS], predictions_NT) > 1000 * TOLERANCE


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_half_precision_between_ranks_shows_in_the_fourth_digit(on_two_ranks: list[Any], sharding: str) -> None:
    seen = {comms: on_two_ranks[0][2][sharding, comms] for comms in COMMS}
    for name, vector_ND in seen["fp32"].vectors.items():
        assert 1e-5 < error_of(seen["fp16"].vectors[name], vector_ND) <= 1e-3, name
    assert 0 < error_of(seen["fp16"].predictions_NT, seen["fp32"].predictions_NT) <= 1e-3
