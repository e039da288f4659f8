"""triptych plan: what it prints is what a run does, without data, a GPU or much memory; and what it says where nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import refused, succeeds, triptych
from tests.small import write_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=200, valid_rows=50)


def test_the_plan_is_the_one_a_run_uses(log: Path, tmp_path: Path) -> None:
    told = succeeds("plan", "--recipe", log, "--ranks", 2, "--json", tmp_path / "plan.json")
    for line in ("rank 0", "rank 1", "table", "user", "item", "words", "total"):
        assert line in told
    assert told.isascii() and max(map(len, told.splitlines())) < 200
    succeeds("train", "--recipe", log, "--run", tmp_path / "run", "--ranks", 2)
    ran, planned = (json.loads(path.read_text()) for path in (tmp_path / "run/plan.json", tmp_path / "plan.json"))
    assert {key: planned[key] for key in ("made_for", "tables", "sha256")} == ran
    shards = {(t, s["rank"], s["rows"], s["columns"]) for t, facts in ran["tables"].items() for s in facts["shards"]}
    assert shards <= {(part["table"], part["rank"], part["rows"], part["columns"]) for part in planned["parts"]}


def test_many_gpus_are_planned_for_without_one_and_without_data(log: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(log.read_text().replace(str(log.parent), str(tmp_path / "nowhere")))
    options = ("--ranks", 16, "--nodes", 2, "--device", "cuda", "--memory", 2, "--host-memory", 8)
    table = ("--set", "tables.user.rows=100000000", "--set", "tables.user.dim=16", "--set", "tables.user.memory=uvm_caching")
    told = succeeds("plan", "--recipe", recipe, *options, *table, "--json", tmp_path / "plan.json")
    assert "16 ranks, 8 on each node" in told and "least: rank" in told and "most: rank" in told and "fused_uvm_caching" in told
    written = json.loads((tmp_path / "plan.json").read_text())
    assert sum(part["weights"] for part in written["parts"] if part["table"] == "user") == 100_000_000 * 16 * 4
    assert all(rank["host"] <= written["room"]["host"] and rank["device"] <= written["room"]["device"] for rank in written["ranks"])


def test_what_does_not_fit_is_one_line(log: Path) -> None:
    options = ("plan", "--recipe", log, "--ranks", 2, "--memory", 4, "--set", "tables.user.rows=200000000")
    line = refused(triptych(*options, "--set", "tables.user.dim=16"))
    assert line.startswith("triptych: the tables do not fit 2 ranks with 4.0 GiB each, of which tables may take 3.2 GiB: rank 0 needs ")
    assert "it fits with 4 ranks on 2 nodes, with " in line and "with dim 4 for table 'user' (16 now)" in line
    succeeds(*options, "--set", "tables.user.dim=4")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--device", "tpu"), "--device tpu: use cpu or cuda"),
        (("--ranks", 3, "--nodes", 2), "nodes must divide ranks"),
        (("--device", "cpu", "--host-memory", 4), "use --memory"),
        (("--set", "tables.user.sharding=column_wise"), "table 'user': sharding = \"column_wise\" needs"),
    ],
)
def test_contradictions(log: Path, options: tuple[object, ...], expected: str) -> None:
    assert expected in refused(triptych("plan", "--recipe", log, *options))
