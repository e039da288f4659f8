"""Random recipes, with plans and batches for them: what a test of any model on any plan draws from. The same seed gives the same one."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from triptych.datasets.batch import Batch
from triptych.datasets.schema import SIDES, Feature
from triptych.embeddings.tables import EmbeddingTable, is_sequence_table
from triptych.launch.config import Recipe

KINDS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel")
Sharding = dict[str, str]
"""{table: kind}."""
MOST_IDS = 6
"""In a list without `max_length`."""


def random_recipe(seed: int) -> Recipe:
    """A small model of any kind: 1 to 5 tables, which up to 8 id features share, 0 to 3 dense features, 1 to 3 tasks."""
    rng = Random(seed)
    tables = [_table(rng, f"table{i}") for i in range(rng.randint(1, 5))]
    features = _id_features(rng, [table["name"] for table in tables])
    dense = [{"name": f"dense{i}", "kind": "dense", "side": rng.choice(SIDES)} for i in range(rng.randint(0, 3))]
    tasks = _tasks(rng)
    train = {"embedding_optimizer": rng.choice(["adagrad", "adagrad", "sgd", "rowwise_adagrad"]), "seed": seed}
    values = {
        "data": {"root": ".", "batch_size": 32},
        "tables": tables,
        "features": rng.sample(features + dense, len(features) + len(dense)),
        "tasks": tasks,
        "model": _model(rng),
        "train": train | {"embedding_eps": 0.01, "embedding_lr": 0.1, "lr": 0.01},
    }
    ends = [[f["name"] for f in features if f["kind"] == "id" and f["side"] == side] for side in ("user", "item")]
    if all(ends) and any(task["kind"] == "binary" for task in tasks) and rng.random() < 0.7:
        values["retrieval"] = {"user": rng.choice(ends[0]), "item": rng.choice(ends[1]), "dim": 4, "layers": rng.choice([[], [8]])}
    return Recipe.model_validate(values)


def _table(rng: Random, name: str) -> dict[str, Any]:
    table: dict[str, Any] = {"name": name, "dim": 4 * rng.randint(1, 6), "dtype": rng.choice(["fp32", "fp16"]), "init": 0.3}
    table["rows"] = rng.randint(2, 4) if rng.random() < 0.25 else rng.randint(5, 200)
    table["ids"] = rng.choice(["index", "hash", "dynamic"])
    if table["ids"] == "dynamic":
        table |= {"min_count": rng.randint(1, 3), "eviction": rng.choice(["lfu", "lru", "distance_lfu"])}
    return table


def _id_features(rng: Random, tables: Sequence[str]) -> list[dict[str, Any]]:
    """Each table has at least one."""
    more = [rng.choice(tables) for _ in range(rng.randint(0, 8 - len(tables)))]
    features: list[dict[str, Any]] = [
        {"name": f"id{i}", "kind": rng.choice(["id", "ids"]), "table": table, "side": rng.choice(SIDES)}
        for i, table in enumerate([*tables, *more])
    ]
    for feature in features:
        if feature["kind"] == "ids":
            feature |= _pooling(rng, [f for f in features if f["kind"] == "id" and f["table"] == feature["table"]])
    return features


def _pooling(rng: Random, targets: list[dict[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {"pooling": rng.choice(["sum", "mean", "attention"] if targets else ["sum", "mean"])}
    if rng.random() < 0.5:
        keys["max_length"] = rng.randint(1, MOST_IDS)
    if keys["pooling"] == "attention":
        keys["positions"] = "max_length" in keys and rng.random() < 0.7
        if not any(target["side"] == "item" for target in targets) or rng.random() < 0.5:
            keys["target"] = rng.choice(targets)["name"]
    return keys


def _tasks(rng: Random) -> list[dict[str, Any]]:
    """A task follows the one that it is given."""
    tasks: list[dict[str, Any]] = []
    for i in range(rng.randint(1, 3)):
        task: dict[str, Any] = {"name": f"task{i}", "kind": rng.choice(["binary", "duration"]), "label": f"label{i}"}
        conditions = [other["name"] for other in tasks if other["kind"] == "binary"]
        if conditions and rng.random() < 0.6:
            task["given"] = rng.choice(conditions)
            if task["kind"] == "binary":
                task["estimator"] = rng.choice(["masked", "esmm"])
        tasks.append(task)
    return tasks


def _model(rng: Random) -> dict[str, Any]:
    numbers = {"experts": rng.randint(1, 3), "task_experts": rng.randint(1, 2), "levels": rng.randint(1, 2)}
    layers = {"expert_layers": rng.choice([[16], [16, 8]]), "tower_layers": rng.choice([[], [8]]), "attention_layers": [8]}
    return {"sharing": rng.choice(["shared_bottom", "mmoe", "ple"]), **numbers, **layers}


def traits(recipe: Recipe) -> set[str]:
    """What a recipe has of that which a plan could treat differently."""
    schema = recipe.data_schema
    found = {recipe.train.embedding_optimizer, recipe.model.sharing} | {f"pooling {f.pooling}" for f in schema.features if f.kind == "ids"}
    found |= {"retrieval"} if recipe.retrieval else set()
    found |= {"positions" for f in schema.features if f.positions}
    found |= {"shared table" for t in recipe.tables if sum(f.table == t.name for f in schema.features) > 1}
    for table in recipe.tables:
        its = {table.dtype, f"{table.ids} ids"} | ({"few rows"} if table.rows < 4 else set()) | ({"odd width"} if table.dim % 8 else set())
        its |= {table.eviction, "waiting"} if table.ids == "dynamic" and table.min_count > 1 else set()
        found |= {f"{trait}, {'sequence' if is_sequence_table(table.name, schema) else 'bag'}" for trait in its}
    return found


def covering(candidates: Sequence[Recipe], count: int) -> list[Recipe]:
    """Recipes that have most traits of all between them: each next one adds most."""
    chosen: list[Recipe] = []
    for _ in range(count):
        had = set().union(*map(traits, chosen))
        chosen.append(max((c for c in candidates if c not in chosen), key=lambda c: len(traits(c) - had)))
    return chosen


class World(NamedTuple):
    num_ranks: int
    on_a_node: int
    """Ranks on each node."""

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks, {self.on_a_node} on a node"


def may_be(table: EmbeddingTable, recipe: Recipe, kind: str, world: World) -> bool:
    sequence = is_sequence_table(table.name, recipe.data_schema)
    if kind in ("row_wise", "table_row_wise"):
        ranks = world.num_ranks if kind == "row_wise" else world.on_a_node
        every_rank_has_a_row = -(-table.rows // ranks) * (ranks - 1) < table.rows  # FBGEMM has no CPU lookup of nothing
        return every_rank_has_a_row and not (sequence and kind == "table_row_wise")
    if kind == "column_wise":
        return recipe.train.embedding_optimizer != "rowwise_adagrad"
    return kind == "table_wise" or (not sequence and table.dtype == "fp32")


def plans_of(recipe: Recipe, world: World, mixes: int) -> list[Sharding]:
    """Each kind for all tables that may have it, table-wise for the others; random mixes; and what the planner likes."""
    rng = Random(recipe.train.seed)
    plans = [{t.name: kind if may_be(t, recipe, kind, world) else "table_wise" for t in recipe.tables} for kind in KINDS]
    plans += [{t.name: "auto" for t in recipe.tables}]
    plans += [{t.name: rng.choice([kind for kind in KINDS if may_be(t, recipe, kind, world)]) for t in recipe.tables} for _ in range(mixes)]
    return [plan for i, plan in enumerate(plans) if plan not in plans[:i]]


def with_plan(recipe: Recipe, plan: Sharding) -> Recipe:
    return recipe.model_copy(update={"tables": tuple(t.model_copy(update={"sharding": plan[t.name]}) for t in recipe.tables)})


def pool(recipe: Recipe, table: str) -> np.ndarray:
    """Every id of a table that batches may hold, int64; of a dynamic one far more than it has rows."""
    its = next(t for t in recipe.tables if t.name == table)
    if its.ids != "dynamic":
        return np.arange(its.rows)
    return np.random.default_rng(recipe.train.seed).integers(-(2**62), 2**62, 10 + 3 * its.rows)


def global_batch(recipe: Recipe, seed: int, num_rows: int) -> Batch:
    """One step's rows of all ranks: lists of any length, empty ones too; some ids are far more frequent than others."""
    rng, schema = np.random.default_rng(seed), recipe.data_schema
    lengths, values = [], []
    for feature in schema.id_features:
        length_B = np.ones(num_rows, np.int64) if feature.kind == "id" else rng.integers(0, _most(feature) + 1, num_rows)
        ids = pool(recipe, str(feature.table))
        lengths.append(length_B)
        values.append(ids[(len(ids) * rng.random(length_B.sum()) ** 2).astype(np.int64)])
    labels_BT, known_BT = np.zeros((num_rows, len(recipe.tasks)), np.float32), np.ones((num_rows, len(recipe.tasks)), bool)
    for t, task in enumerate(recipe.tasks):  # a task follows those it is given
        known_BT[:, t] = (labels_BT[:, schema.ancestors(task)] == 1).all(1)
        label_B = rng.random(num_rows) < 0.6 if task.kind == "binary" else rng.exponential(5.0, num_rows)
        labels_BT[:, t] = known_BT[:, t] * label_B  # 0 where unknown
    return Batch(
        _jagged(schema.id_feature_names, lengths, values),
        torch.from_numpy(rng.standard_normal((num_rows, schema.dense_width)).astype(np.float32)),
        torch.from_numpy(labels_BT),
        torch.from_numpy(known_BT),
        torch.from_numpy(rng.random(num_rows).astype(np.float32)),
        torch.arange(num_rows),
    )


def every_id(recipe: Recipe) -> Batch:
    """One row that holds every id of every table, in all of its features. For its ids alone."""
    ids = [pool(recipe, str(f.table)) for f in recipe.data_schema.id_features]
    zero_1T = torch.zeros(1, len(recipe.tasks))
    lengths = [np.array([len(i)]) for i in ids]
    jagged = _jagged(recipe.data_schema.id_feature_names, lengths, ids)
    return Batch(jagged, torch.zeros(1, 0), zero_1T, zero_1T > 0, zero_1T[:, 0], torch.zeros(1, dtype=torch.int64))


def _most(feature: Feature) -> int:
    return feature.max_length or MOST_IDS


def _jagged(names: list[str], lengths: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(names, torch.from_numpy(np.concatenate(values)), lengths=torch.from_numpy(np.concatenate(lengths)))


def dealt(batch: Batch, rank: int, world_size: int) -> Batch:
    """A rank's rows of a global batch, one run of them; the last ranks' are filled up with padded rows."""
    num_rows = len(batch.row_B)
    num_own = -(-num_rows // world_size)
    first, last = min(rank * num_own, num_rows), min((rank + 1) * num_own, num_rows)
    missing = num_own - (last - first)

    def cut(part: torch.Tensor, padding: float = 0) -> torch.Tensor:
        return torch.cat([part[first:last], part.new_full((missing, *part.shape[1:]), padding)])

    jagged = [batch.ids[name] for name in batch.ids.keys()]  # noqa: SIM118
    values = torch.cat([j.values()[j.offsets()[first] : j.offsets()[last]] for j in jagged])
    ids = KeyedJaggedTensor(batch.ids.keys(), values, lengths=torch.cat([cut(j.lengths()) for j in jagged]))
    parts = (batch.dense_BD, batch.labels_BT, batch.known_BT, batch.weight_B)
    return Batch(ids, *map(cut, parts), cut(batch.row_B, -1))
