"""The command line as a user meets it: every command on a small log, through TorchX, and what wrong input says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import ROOT, TIMEOUT_SECONDS, refused, succeeds, triptych
from tests.small import rows, write_log
from triptych.embeddings.vectors import read_all
from triptych.launch import cli
from triptych.launch.console import PROGRESS
from triptych.mmoe.metrics import auc


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=1500)


@pytest.fixture(scope="module")
def run(log: Path) -> Path:
    run = log.parent / "run"
    out = succeeds(
        "train", "--recipe", log, "--run", run, "--ranks", 2, "--set", "train.epochs=4", "--set", "tables.user.sharding=row_wise"
    )
    assert "valid at step" in out and "train 48/48" in out
    return run


def test_a_run_leaves_what_it_did(run: Path) -> None:
    assert {"recipe.toml", "plan.json", "metrics.jsonl", "tensorboard", "checkpoints", "result.json"} <= {
        path.name for path in run.iterdir()
    }
    plan = json.loads((run / "plan.json").read_text())["tables"]
    assert plan["user"]["sharding"] == "row_wise" and {shard["rank"] for shard in plan["user"]["shards"]} == {0, 1}
    result = json.loads((run / "result.json").read_text())
    assert (result["split"], result["rows"]) == ("valid", 200)
    assert {"kind", "rows", "auc", "gauc", "ne", "logloss", "calibration"} <= result["tasks"]["ctr"].keys()
    assert result["tasks"]["cvr"]["given"] == "ctr" and result["tasks"]["cvr"]["joint"]["rows"] == 200
    assert result["tasks"]["cvr"]["rows"] == result["tasks"]["ctr"]["positives"]
    assert {"mae", "rmse", "xauc"} <= result["tasks"]["dwell"].keys()
    assert set(result["scenarios"]) == {"home", "search", "feed"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [[record["loss"]["ctr"] for record in records if record.get("epoch") == epoch] for epoch in range(4)]
    assert np.mean(losses[3]) < np.mean(losses[0])
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "checkpoints" / f"step_{result['step']}").is_dir()


def test_evaluation_repeats_the_result_on_any_number_of_ranks(run: Path, log: Path, tmp_path: Path) -> None:
    expected = json.loads((run / "result.json").read_text())
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        succeeds("evaluate", "--run", run, "--data", log.parent / "valid.parquet", "--json", out, "--ranks", ranks)
        found = json.loads(out.read_text())
        assert (found["split"], found["rows"], found["step"]) == ("valid", 200, expected["step"])
        for task, metrics in expected["tasks"].items():
            for name, value in metrics.items():
                if isinstance(value, float):
                    assert found["tasks"][task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_predictions_come_in_row_order_and_need_no_labels(run: Path, log: Path, tmp_path: Path) -> None:
    valid = pq.read_table(log.parent / "valid.parquet")
    unlabelled = valid.drop_columns(["click", "buy", "dwell_ms"])
    pq.write_table(unlabelled, tmp_path / "forward.parquet", row_group_size=33)
    pq.write_table(unlabelled.take(np.arange(len(valid))[::-1]), tmp_path / "backward.parquet", row_group_size=70)
    predictions = {}
    for name, ranks in (("forward", 2), ("backward", 1)):
        out = tmp_path / "out" / f"{name}.parquet"
        succeeds("predict", "--run", run, "--data", tmp_path / f"{name}.parquet", "--out", out, "--ranks", ranks)
        table = pq.read_table(out)
        assert table.column_names == ["ctr", "cvr", "dwell"]
        predictions[name] = np.stack([table.column(task).to_numpy() for task in table.column_names], axis=1)
    np.testing.assert_allclose(predictions["forward"], predictions["backward"][::-1], rtol=1e-5)
    result = json.loads((run / "result.json").read_text())
    assert auc(predictions["forward"][:, 0], valid.column("click").to_numpy()) == pytest.approx(result["tasks"]["ctr"]["auc"], rel=1e-5)


def test_search_finds_the_items_of_largest_inner_product(run: Path, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    succeeds("export", "--run", run, "--out", out, "--ranks", 2)
    users, user_ND = read_all(out / "users", "user")
    items, item_ND = read_all(out / "items", "item")
    train = rows(1500)
    assert sorted(users.to_pylist()) == sorted(set(train["user"].tolist()))
    assert sorted(items.to_pylist()) == sorted(set(train["item"].tolist()))
    position = 5
    scores_N = item_ND @ user_ND[position]
    best = np.argsort(-scores_N, kind="stable")[:7]
    found = json.loads(succeeds("search", "--index", out, "--user", users[position].as_py(), "-k", 7, "--json"))
    assert [entry["item"] for entry in found] == [items[int(n)].as_py() for n in best]
    np.testing.assert_allclose([entry["score"] for entry in found], scores_N[best], rtol=1e-5)
    assert "is not in" in refused(triptych("search", "--index", out, "--user", 10_000))
    assert "int64" in refused(triptych("search", "--index", out, "--user", "nobody"))
    single = tmp_path / "single"
    succeeds("export", "--run", run, "--out", single)
    one_rank_users, one_rank_ND = read_all(single / "users", "user")
    order, other = np.argsort(users.to_numpy()), np.argsort(one_rank_users.to_numpy())
    np.testing.assert_allclose(user_ND[order], one_rank_ND[other], rtol=1e-5, atol=1e-7)


def test_a_run_is_never_overwritten_and_a_finished_one_resumes_to_its_end(run: Path, log: Path) -> None:
    before = (run / "result.json").read_text()
    assert "--resume" in refused(triptych("train", "--recipe", log, "--run", run))
    out = succeeds("train", "--recipe", run / "recipe.toml", "--run", run, "--ranks", 1, "--resume")
    assert "resumed from" in out
    assert (run / "result.json").read_text() == before


def test_more_ranks_than_row_groups(tmp_path: Path) -> None:
    log = write_log(tmp_path, train_rows=100, valid_rows=5, row_group_rows=1000)
    succeeds("train", "--recipe", log, "--run", tmp_path / "run", "--ranks", 3)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rows"] == 5


def test_torchx_runs_the_component(log: Path, tmp_path: Path) -> None:
    """As on a cluster, with the local scheduler; from the checkout, as the README says."""
    command = [
        "torchx",
        "run",
        "-s",
        "local_cwd",
        "--wait",
        "launch/component.py:train",
        "--recipe",
        str(log),
        "--run",
        str(tmp_path / "run"),
        "--ranks",
        "2",
    ]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "result.json").is_file()


def test_a_killed_rank_is_named(log: Path, tmp_path: Path) -> None:
    """As the kernel does when memory runs out; the other rank's lost connection is no news."""
    args = ["train", "--recipe", log, "--run", tmp_path / "run", "--ranks", 2, "--set", "train.epochs=100000", "--set", "train.log_every=1"]
    command = [sys.executable, "-m", "triptych.launch.cli", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT.parent, env=env) as process:
        next(line for line in process.stdout if PROGRESS.match(line))
        victim = wait_for_rank(str(tmp_path / "run"), "1")
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "rank 1 was killed by signal 9" in err and "gloo" not in err, err


def wait_for_rank(run: str, rank: str) -> int:
    """The process of one rank of a run, once it is there."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = (folder / "cmdline").read_text(), (folder / "environ").read_text()
            except OSError:
                continue
            if run in command and "triptych.launch.train" in command and f"\0RANK={rank}\0" in environment:
                return int(folder.name)
        time.sleep(0.1)
    raise AssertionError("the rank never came up")


BAD_COLUMNS = {
    "null label": ("click", lambda values: pa.array([None, *values[1:]], pa.int64()), ("train.parquet", "click", "1 nulls")),
    "NaN": ("length", lambda values: pa.array([float("nan"), *values[1:]]), ("train.parquet", "length", "NaN")),
    "index id": ("item", lambda values: pa.array([2048, *values[1:]]), ("train.parquet", "feature 'item'", "2048", "60 rows")),
}


@pytest.mark.parametrize("case", list(BAD_COLUMNS))
def test_ranks_refuse_bad_rows_in_one_line(case: str, tmp_path: Path) -> None:
    column, spoil, fragments = BAD_COLUMNS[case]
    log = write_log(tmp_path, train_rows=300, valid_rows=20)
    table = pq.read_table(tmp_path / "train.parquet")
    position = table.column_names.index(column)
    spoiled = spoil(table.column(column).to_pylist())
    pq.write_table(table.set_column(position, column, spoiled), tmp_path / "train.parquet")
    valid = pq.read_table(tmp_path / "valid.parquet")
    pq.write_table(valid.set_column(position, column, valid.column(column).cast(spoiled.type)), tmp_path / "valid.parquet")
    line = refused(triptych("train", "--recipe", log, "--run", tmp_path / "run", "--ranks", 2))
    assert all(fragment in line for fragment in fragments), line


def wrong_commands(log: Path, run: Path) -> dict[str, tuple[list[object], list[str]]]:
    train = ["train", "--recipe", log, "--run", run]
    return {
        "recipe": (["train", "--recipe", "kuairant", "--run", run], ["no such recipe", "kuairand"]),
        "data root": ([*train, "--set", "data.root=/nowhere"], ["no such file", "/nowhere/train.parquet"]),
        "file": ([*train, "--set", "data.train=trian.parquet"], ["no such file", "trian.parquet", "train.parquet"]),
        "column": ([*train, "--set", "tasks.ctr.label=clik"], ["clik", "train.parquet", "'click'"]),
        "feature column": ([*train, "--set", "features.length.column=lenght"], ["lenght", "'length'"]),
        "type": ([*train, "--set", "features.length.column=page"], ["page", "string", "numbers"]),
        "key": ([*train, "--set", "train.epoch=2"], ["unknown key 'train.epoch'", "epochs"]),
        "value": ([*train, "--set", "tables.user.ids=hsh"], ["tables.user.ids", "hash"]),
        "given": ([*train, "--set", "tasks.cvr.given=ctl"], ["ctl", "'ctr'"]),
        "leak": ([*train, "--set", "features.length.column=buy"], ["buy", "leak"]),
        "column-wise with row-wise Adagrad": ([*train, "--set", "tables.user.sharding=column_wise"], ["column_wise", "adagrad"]),
        "command": (["tarin"], ["tarin", "--help"]),
        "option": (["train", "--run", run], ["Missing option", "--recipe"]),
        "ranks": ([*train, "--ranks", 0], ["--ranks", "1"]),
        "seed": ([*train, "--set", "train.seed=-1"], ["train.seed", "greater than or equal to 0"]),
        "folder": (["synth", "--out", log, "--rows", 1000], ["cannot write"]),
        "no run": (["evaluate", "--run", run, "--data", "valid.parquet"], ["no run there"]),
        "no export": (["search", "--index", run, "--user", 1], ["no export there"]),
    }


@pytest.mark.parametrize("case", list(wrong_commands(Path(), Path())))
def test_wrong_input_is_one_line_and_exit_code_2(case: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, fragments = wrong_commands(log, tmp_path / "run")[case]
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(arg) for arg in args])
    line = capsys.readouterr().err
    assert exit_.value.code == 2 and line.count("\n") == 1, line
    assert all(fragment in line for fragment in fragments), line


def test_empty_data_is_refused(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pq.read_table(log.parent / "train.parquet").slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--recipe", str(log), "--run", str(tmp_path / "run"), "--set", f"data.train={tmp_path / 'empty.parquet'}"])
    assert exit_.value.code == 2 and "empty.parquet: no rows" in capsys.readouterr().err
