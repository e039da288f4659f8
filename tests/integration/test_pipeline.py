"""The component `pipeline` through TorchX: from raw files to metrics in one job; started again it does nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.census_log import write
from triptych.launch.pipeline import stages_of

ROOT = Path(__file__).parents[2]
SETTINGS = "train.log_every=1;data.batch_size=64;train.evaluate_every=0"


def run_pipeline(folder: Path, **args: object) -> subprocess.CompletedProcess[str]:
    options = [str(part) for key, value in args.items() for part in (f"--{key}", value)]
    torchx = str(Path(sys.executable).with_name("torchx"))
    command = [torchx, "run", "--scheduler", "local_cwd", f"{ROOT / 'launch' / 'component.py'}:pipeline", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=env, check=False)


def test_from_raw_files_to_metrics(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "census-income.data", 1000, 0)
    write(tmp_path / "raw" / "census-income.test", 100, 1)
    args = {
        "recipe": "census", "prepare": "census", "source": tmp_path / "raw", "prepared": tmp_path / "log", "run": tmp_path / "run",
        "data": "test.parquet", "json": tmp_path / "metrics.json", "set": SETTINGS, "ranks": 2,
    }  # fmt: skip
    first = run_pipeline(tmp_path, **args)
    assert first.returncode == 0, first.stdout + first.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["rows"] == 100 and metrics["split"] == "test"
    said = (first.stdout + first.stderr).replace("pipeline/0 ", "")
    assert f"[0]:{tmp_path / 'log'}: train.parquet 900, valid.parquet 100, test.parquet 100" in said

    again = run_pipeline(tmp_path, **args, resume="true")
    assert again.returncode == 0, again.stdout + again.stderr
    said = (again.stdout + again.stderr).replace("pipeline/0 ", "")
    assert f"[0]:{tmp_path / 'log'}: was prepared before from the same files" in said
    assert "[0]:train " not in said
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_the_first_stage_that_fails_ends_it(tmp_path: Path) -> None:
    args = {"recipe": "census", "prepare": "census", "source": tmp_path, "prepared": tmp_path / "log"}
    done = run_pipeline(tmp_path, **args, run=tmp_path / "run", data="test.parquet")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert "census-income" in done.stdout + done.stderr


@pytest.mark.parametrize("given", [{"prepare": "census"}, {"source": "raw"}, {"prepare": "census", "prepared": "log"}])
def test_preparing_needs_all_three(tmp_path: Path, given: dict[str, str]) -> None:
    done = run_pipeline(tmp_path, recipe="census", run=tmp_path / "run", data="test.parquet", **given)
    assert done.returncode == 1
    assert "prepare, source and prepared go together" in done.stderr.strip().splitlines()[-1]


def test_stages() -> None:
    assert stages_of(["--nnodes", "2", "-m", "a", "--then", "-m", "b", "--data", "x"]) == [
        ["--nnodes", "2", "-m", "a"],
        ["-m", "b", "--data", "x"],
    ]
