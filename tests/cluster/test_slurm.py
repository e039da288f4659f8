"""The components on a Slurm cluster of two nodes: the same metrics and vectors as on this machine, and TorchX's own commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.jobs import submit, torchx
from tests.cluster.slurm import Slurm
from tests.command import succeeds
from tests.small import write_log
from triptych.embeddings.vectors import read_all


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=2000)


@pytest.fixture(scope="module")
def here(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, evaluated and exported on this machine."""
    folder = tmp_path_factory.mktemp("here")
    run = folder / "run"
    succeeds("train", "--recipe", recipe, "--run", run, "--ranks", 2)
    succeeds("evaluate", "--run", run, "--data", "valid.parquet", "--json", folder / "metrics.json", "--ranks", 2)
    succeeds("export", "--run", run, "--out", folder / "vectors", "--ranks", 2)
    return folder


def as_json(path: Path) -> Any:
    return json.loads(path.read_text())


def check_vectors(found: Path, expected: Path) -> None:
    for side, ids in (("users", "user"), ("items", "item")):
        found_ids, found_ND = read_all(found / side, ids)
        expected_ids, expected_ND = read_all(expected / side, ids)
        assert found_ids.equals(expected_ids) and len(found_ids) > 50
        np.testing.assert_allclose(found_ND, expected_ND, rtol=1e-5, atol=1e-7)


def close(found: Any, expected: Any) -> None:
    """Equal metrics, but for the order in which threads of another number add."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5), (found, expected)
    else:
        assert found == expected


def test_each_component_does_what_the_command_line_does(slurm: Slurm, recipe: Path, here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = submit(slurm, tmp_path / "jobs", "train", recipe=recipe, run=run).succeeds()
    close(as_json(run / "result.json"), as_json(here / "run" / "result.json"))
    started = as_json(run / "run.json")["starts"][0]
    assert sorted(rank["host"] for rank in started["ranks"]) == ["n1", "n2"]
    submit(slurm, tmp_path / "jobs", "evaluate", run=run, data="valid.parquet", json=tmp_path / "metrics.json").succeeds()
    close(as_json(tmp_path / "metrics.json"), as_json(here / "metrics.json"))
    submit(slurm, tmp_path / "jobs", "export", run=run, out=tmp_path / "vectors").succeeds()
    check_vectors(tmp_path / "vectors", here / "vectors")

    status = training.torchx("status", training.handle)
    assert "train[0]:SUCCEEDED" in status and "train[1]:SUCCEEDED" in status
    said = [line for line in training.torchx("log", "--streams", "stdout", training.handle).splitlines() if "[0]:" in line]
    assert "[0]:valid at step 16: ctr auc" in said[-3], said


def test_the_pipeline_is_one_job(slurm: Slurm, recipe: Path, here: Path, tmp_path: Path) -> None:
    files = {"json": tmp_path / "metrics.json", "out": tmp_path / "vectors"}
    submit(slurm, tmp_path / "jobs", "pipeline", recipe=recipe, run=tmp_path / "run", data="valid.parquet", **files).succeeds()
    close(as_json(tmp_path / "metrics.json"), as_json(here / "metrics.json"))
    check_vectors(tmp_path / "vectors", here / "vectors")


def test_wrong_input_is_the_last_thing_said(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "jobs", "train", recipe=recipe, run=tmp_path / "run", set="tasks.ctr.label=nothing", max_retries=3)
    job.wait_for(lambda: job.state == "", "the job ends, and is not queued again")
    for replica in (0, 1):
        last = (tmp_path / "jobs" / f"slurm-{job.id}-train-{replica}.err").read_text().strip().splitlines()[-1]
        assert "triptych: " in last and "nothing" in last and "train.parquet" in last, job.log
    assert "FAILED" in torchx(slurm, tmp_path / "jobs", "status", job.handle)


def test_a_finished_run_is_left_alone(slurm: Slurm, recipe: Path, here: Path, tmp_path: Path) -> None:
    """Another job does not go on with it by itself, though it may be retried."""
    before = {path: path.read_bytes() for path in (here / "run").glob("*.*") if path.is_file()}
    job = submit(slurm, tmp_path / "jobs", "train", recipe=recipe, run=here / "run", set="train.lr=0.5", max_retries=1)
    job.wait_for(lambda: job.state == "", "the job ends, and is not queued again")
    assert f"triptych: {here / 'run'} already holds a trained run; add --resume to go on with it" in job.log
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.long  # test_port_of_job.py has the ports
def test_jobs_share_nodes(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    """The first one's end leaves the other alone."""
    jobs = [
        submit(slurm, tmp_path / f"jobs_{number}", "train", recipe=recipe, run=tmp_path / f"run_{number}", set=f"train.epochs={epochs}")
        for number, epochs in enumerate((1, 6))
    ]
    times = [job.succeeds().slurm.user("sacct", "-n", "-X", "-j", job.id, "-o", "Start,End").split()[:2] for job in jobs]
    (_, first_ended), (second_began, second_ended) = times
    assert second_began < first_ended < second_ended
