"""Dynamic ids in training: the same on any number of ranks and plan, exact through checkpoints; new ids learn while hashed ones collide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.ranks import run_on_ranks
from tests.runs import local_values, stopped_copy
from tests.small import write_log
from triptych.embeddings.vectors import read_all
from triptych.launch.build import model_state, optimizer_state
from triptych.launch.config import Recipe, load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.export import export
from triptych.launch.inference import predict_rows
from triptych.launch.trainer import Trainer

GLOBAL_BATCH = 60
# 200 users for 65 rows, so that rows change hands; `bought` and `user` share the table.
DYNAMIC = ["tables.user.ids=dynamic", "tables.user.rows=65", "tables.words.ids=dynamic", "tables.words.min_count=2"]
ONE_RANK_PLAN = ["tables.user.sharding=row_wise", "tables.words.sharding=data_parallel"]
EVERY = ["train.epochs=2", "checkpoint.every_steps=4", "checkpoint.keep=1000", "train.evaluate_every=7"]


def dynamic_recipe(path: Path, world_size: int, *more: str) -> Recipe:
    return load_recipe(path, [*DYNAMIC, *EVERY, f"data.batch_size={GLOBAL_BATCH // world_size}", *more])


def fit(ranks: Ranks, path: Path, run: Path, more: list[str], resume: bool) -> dict[str, Any]:
    """Train; this rank's parts of everything, and the first rank's predictions of `valid`."""
    trainer = Trainer(dynamic_recipe(path, ranks.world_size, *more), run, ranks, resume=resume)
    trainer.fit()
    assert trainer.valid is not None
    predictions = predict_rows(trainer.built, trainer.valid.loader, ranks)
    state = {**model_state(trainer.built), **optimizer_state(trainer.built)}
    return {"parts": local_values(state), "predictions": None if predictions is None else predictions.prediction_NT}


def fit_all(ranks: Ranks, path: Path, runs: dict[Path, list[str]], resume: bool) -> list[dict[str, Any]]:
    return [fit(ranks, path, run, more, resume) for run, more in runs.items()]


def whole(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """All ranks' parts joined."""
    joined = {}
    for name in set().union(*(result["parts"] for result in results)):
        ends = [torch.tensor(offsets) + torch.tensor(t.shape) for result in results for offsets, t in result["parts"].get(name, [])]
        joined[name] = torch.full(torch.stack(ends).amax(0).long().tolist(), torch.nan, dtype=torch.float64)
        for result in results:
            for offsets, tensor in result["parts"].get(name, []):
                joined[name][tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))] = tensor.double()
        assert not joined[name].isnan().any(), name
    return joined


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def one_rank(log: Path) -> tuple[Path, list[dict[str, Any]]]:
    run = log.parent / "one_rank"
    return run, run_on_ranks(1, fit, log, run, ONE_RANK_PLAN, False)


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    found_state, expected_state = whole(found), whole(expected)
    assert found_state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        if name.startswith("ids/"):
            assert torch.equal(found_state[name], value), name
        else:
            error = (found_state[name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < 1e-5, (name, float(error))
    np.testing.assert_allclose(found[0]["predictions"], expected[0]["predictions"], rtol=1e-5)


@pytest.mark.parametrize("world_size, plans", [(2, ["table_wise", "data_parallel"]), (3, ["row_wise"])])
def test_rows_are_the_same_on_any_number_of_ranks_and_plan(
    log: Path, one_rank: tuple[Path, list[dict[str, Any]]], world_size: int, plans: list[str]
) -> None:
    runs = {log.parent / plan: [f"tables.{table}.sharding={plan}" for table in ("user", "words")] for plan in plans}
    found = run_on_ranks(world_size, fit_all, log, runs, False)
    for i in range(len(plans)):
        assert_same([results[i] for results in found], one_rank[1])


def test_a_resumed_run_equals_the_undisturbed_one(log: Path, one_rank: tuple[Path, list[dict[str, Any]]]) -> None:
    run, expected = one_rank
    stops = (4, 7, 16)  # between evaluations, at one, in the second epoch
    runs = {stopped_copy(run, stop): ONE_RANK_PLAN for stop in stops}
    for found in run_on_ranks(1, fit_all, log, runs, True)[0]:
        for name, parts in expected[0]["parts"].items():
            for (_, tensor), (_, expected_tensor) in zip(found["parts"][name], parts, strict=True):
                assert torch.equal(tensor, expected_tensor), name
        assert np.array_equal(found["predictions"], expected[0]["predictions"])


def test_a_run_goes_on_with_another_number_of_ranks(log: Path, one_rank: tuple[Path, list[dict[str, Any]]]) -> None:
    run, expected = one_rank
    found = run_on_ranks(2, fit, log, stopped_copy(run, 8), [], True)
    assert_same(found, expected)


def test_counters_are_in_the_metrics(one_rank: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = [json.loads(line) for line in (one_rank[0] / "metrics.jsonl").read_text().splitlines()]
    found = [line["ids"] for line in lines if "ids" in line]
    assert all(ids.keys() == {"user", "words"} for ids in found)
    assert sum(ids["user"]["evicted"] for ids in found) > 0
    admitted, evicted = (sum(ids["user"][key] for ids in found) for key in ("admitted", "evicted"))
    assert found[-1]["user"]["occupancy"] == pytest.approx((admitted - evicted) / 64)
    assert 0 < found[0]["user"]["hit_rate"] < found[-1]["user"]["hit_rate"] < 1


def write_new_ids(root: Path) -> Path:
    """A log whose ids are all new in the second half, and each of which has a click rate of its own: nothing else says anything."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    rate = rng.random(2000)

    def part(first: int, last: int, count: int) -> pa.Table:
        user = rng.integers(first, last, count)
        click = (rng.random(count) < rate[user]).astype(np.int64)
        return pa.table({"user": user + 10**12, "click": click})

    pq.write_table(pa.concat_tables([part(0, 1000, 20_000), part(1000, 2000, 20_000)]), root / "train.parquet", row_group_size=5_000)
    pq.write_table(part(1000, 2000, 10_000), root / "valid.parquet")
    (root / "recipe.toml").write_text(f"""
[data]
root = "{root}"
train = "train.parquet"
valid = "valid.parquet"
batch_size = 100
shuffle = false
[[tables]]
name = "user"
rows = 1200
dim = 8
[[features]]
name = "user"
kind = "id"
table = "user"
side = "user"
[[tasks]]
name = "ctr"
kind = "binary"
label = "click"
[model]
sharing = "shared_bottom"
expert_layers = [16]
tower_layers = []
[train]
embedding_lr = 0.2
lr = 0.01
""")
    return root / "recipe.toml"


def auc_of(ranks: Ranks, path: Path, folder: Path, tables: dict[str, list[str]]) -> dict[str, float]:
    """The AUC on `valid` with each kind of table."""
    for name, keys in tables.items():
        Trainer(load_recipe(path, [f"tables.user.{key}" for key in keys]), folder / name, ranks, resume=False).fit()
    return {name: json.loads((folder / name / "result.json").read_text())["tasks"]["ctr"]["auc"] for name in tables}


def test_new_ids_learn_while_hashed_ones_collide(tmp_path: Path) -> None:
    """1,200 rows for 1,000 old and 1,000 new ids. Hashed, an id shares its row with others, old ones included; dynamic, it has its own."""
    recipe = write_new_ids(tmp_path / "log")
    tables = {
        "lru": ["ids=dynamic", "eviction=lru"],
        "distance_lfu": ["ids=dynamic"],
        "lfu": ["ids=dynamic", "eviction=lfu"],
        "hashed": ["ids=hash"],
        "room for all": ["ids=hash", "rows=100000"],
    }
    auc = run_on_ranks(1, auc_of, recipe, tmp_path, tables)[0]
    assert auc["lru"] > auc["hashed"] + 0.04 and abs(auc["lru"] - auc["room for all"]) < 0.01
    assert auc["distance_lfu"] > auc["hashed"] + 0.02
    # Ids that were frequent once keep their rows, and the new ones take each other's.
    assert auc["lfu"] < auc["hashed"]


def export_run(ranks: Ranks, run: Path, out: Path) -> None:
    export(run, out, ranks)


def test_an_export_holds_raw_ids(log: Path, one_rank: tuple[Path, list[dict[str, Any]]]) -> None:
    run = one_rank[0]
    vectors = {}
    for world_size in (1, 2):
        out = run.with_name(f"vectors_{world_size}")
        run_on_ranks(world_size, export_run, run, out)
        ids, vector_ND = read_all(out / "users", "user")
        order = np.argsort(ids.to_numpy())
        vectors[world_size] = ids.to_numpy()[order], vector_ND[order]
    users = np.unique(pq.read_table(log.parent / "train.parquet", columns=["user"]).column(0).to_numpy())
    for ids, _ in vectors.values():
        assert np.array_equal(ids, users)
    np.testing.assert_allclose(vectors[2][1], vectors[1][1], rtol=1e-5, atol=1e-7)
