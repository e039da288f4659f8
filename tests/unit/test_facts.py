"""What run.json says of the code and the machine, and how ranks hear each other's last words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT
from triptych.datasets.schema import InputError
from triptych.launch.nodes.facts import REVISION, cpu_model, is_of_this_job, revision, starts, versions


def git(root: Path, *args: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", str(root), *author, *args], capture_output=True, text=True, check=True).stdout.strip()


def test_revision_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REVISION, raising=False)
    (tmp_path / "code.py").write_text("a = 1\n")
    assert revision(tmp_path) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert revision(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "code.py").write_text("a = 2\n")
    assert revision(tmp_path) == {"commit": head, "dirty": True}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert revision(inside) is None, "of another project's checkout"
    for told, dirty in ((head, False), (f"{head}-dirty", True)):
        monkeypatch.setenv(REVISION, told)
        assert revision(inside) == {"commit": head, "dirty": dirty}
    assert revision(tmp_path) == {"commit": head, "dirty": True}, "history beside the code counts"


def test_versions_and_cpu(tmp_path: Path) -> None:
    found = versions()
    assert {"python", "torch", "torchrec", "torchx", "pyarrow", "numpy", "cuda"} <= found.keys()
    assert found["torch"] == str(__import__("torch").__version__)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: a\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "none") == os.uname().machine


def test_a_damaged_run_json_is_named_and_left_alone(tmp_path: Path) -> None:
    assert starts(tmp_path) == []
    (tmp_path / "run.json").write_text('{"starts": [')
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        starts(tmp_path)


def test_warnings_are_one_line_with_the_stage() -> None:
    code = (
        "import logging, warnings; from triptych.launch.console import warn_with_stage; from triptych.launch.faults.stages import stage;"
        "warn_with_stage(); stage('training step 7'); warnings.warn('first\\nsecond'); logging.getLogger('some').warning('third\\nfourth')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stderr.splitlines() == [
        "warning in 'training step 7': UserWarning: first second (<string>:1)",
        "warning in 'training step 7': third fourth (some)",
    ]


def test_a_job_that_is_started_anew_knows_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHX_JOB_ID", "slurm://torchx/7")
    assert not is_of_this_job(tmp_path)
    start = lambda job: {"scheduler": {"TORCHX_JOB_ID": job} if job else {}}  # noqa: E731
    for jobs, is_own in ((["slurm://torchx/7"], True), (["slurm://torchx/7", "slurm://torchx/8"], False), ([None], False)):
        (tmp_path / "run.json").write_text(json.dumps({"starts": [start(job) for job in jobs]}))
        assert is_of_this_job(tmp_path) is is_own
    monkeypatch.delenv("TORCHX_JOB_ID")
    assert not is_of_this_job(tmp_path)
