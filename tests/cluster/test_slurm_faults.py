"""A training on a Slurm cluster that loses a node, is preempted or cancelled: it comes back, and no row is lost or trained twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.jobs import Job, submit
from tests.cluster.slurm import Slurm
from tests.faults.campaign import Campaign, assert_equal_runs
from tests.small import write_log
from triptych.launch.checkpoints.manifest import committed, step_of

COMPONENT = Path(__file__).parent / "component.py"
SAVE_EVERY, STEPS, BATCH = 10, 157, 64
SETTINGS = [f"checkpoint.every_steps={SAVE_EVERY}", "checkpoint.keep=2", "train.timeout_s=180"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=20_000, row_group_rows=1000)


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on the same cluster, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    submit(slurm, folder, "train", recipe=recipe, run=folder / "run", set=";".join(SETTINGS)).succeeds()
    return folder / "run"


@dataclass
class Training:
    """One that keeps ledgers."""

    job: Job
    folder: Path
    recipe: Path
    undisturbed: Path

    @property
    def campaign(self) -> Campaign:
        return Campaign(self.folder, self.recipe, SETTINGS, [], self.undisturbed, global_batch=2 * BATCH)

    def lines(self, start: int) -> list[dict[str, float]]:
        """What the first rank wrote down after the job was started so often before."""
        path = self.folder / f"ledger.{start:02d}.00.0.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def reach(self, step: int) -> None:
        """Wait until it trained a step."""
        self.job.wait_for(lambda: any(line.get("step", 0) >= step for line in self.lines(0)), f"step {step}")

    def comes_back(self, since: float) -> str:
        """Wait until the job is queued again, let it begin, and wait for its next step; returns what to report."""
        queued = self.job.wait_for(lambda: self.job.state == "PENDING", "the job is queued again")
        self.job.begin_soon()
        self.job.wait_for(lambda: len(self.lines(1)) > 1, "the next step is trained")
        first, before = self.lines(1), self.lines(0)
        repeated = before[-1]["step"] - first[0]["from"]
        assert 0 <= repeated <= 2 * SAVE_EVERY
        return f"queued again after {queued:.0f} s, next step {first[1]['time'] - since:.0f} s after, {repeated:.0f} steps trained again"

    def check(self) -> None:
        """It ended as if nothing had happened."""
        self.job.succeeds()
        assert step_of(committed(self.folder / "run" / "checkpoints")[-1]) == STEPS
        self.campaign.check_rows()
        self.campaign.check_folder(keep=2, keep_best=1)
        assert_equal_runs(self.folder / "run", self.undisturbed)


@pytest.fixture
def training(slurm: Slurm, recipe: Path, undisturbed: Path, tmp_path: Path) -> Training:
    args = {"recipe": recipe, "run": tmp_path / "run", "ledgers": tmp_path, "set": ";".join(SETTINGS), "max_retries": 2}
    job = submit(slurm, tmp_path / "jobs", "train", COMPONENT, **args)
    return Training(job, tmp_path, recipe, undisturbed)


def kill_all(slurm: Slurm) -> None:
    """SIGKILL of the daemon, torchrun and ranks of a node; the daemon starts again, as a system's service does."""
    slurm.hosts["n2"].run("sh", "-c", "kill -9 -1", check=False)
    slurm.start_node("n2")


def power_off(slurm: Slurm) -> None:
    """The node says nothing more, and is back at once: too soon for Slurm. srun loses it, or the rank that it left behind finds out."""
    slurm.hosts["n2"].off()
    slurm.hosts.switch_on("n2")
    slurm.start_node("n2")


@pytest.mark.parametrize("lose_node", [kill_all, power_off])
def test_a_lost_node(slurm: Slurm, training: Training, lose_node: Callable[[Slurm], None], report: Callable[[str], None]) -> None:
    training.reach(35)
    lost = time.time()
    lose_node(slurm)
    report(f"{lose_node.__name__}: {training.comes_back(lost)}")
    training.check()


def test_a_signal_before_preemption(slurm: Slurm, training: Training, report: Callable[[str], None]) -> None:
    """SIGTERM to the job's steps, as of `--signal` and of preemption with a grace time: it saves first, and is queued again."""
    training.reach(35)
    asked = time.time()
    slurm.user("scancel", "--signal=TERM", training.job.id)
    report(f"scancel --signal=TERM: {training.comes_back(asked)}")
    assert training.lines(1)[0]["from"] == training.lines(0)[-1]["step"]
    training.check()


def test_cancelled(slurm: Slurm, training: Training, report: Callable[[str], None]) -> None:
    """It saves first, is not queued again, and goes on with `--resume true`."""
    training.reach(35)
    training.job.torchx("cancel", training.job.handle)
    took = training.job.wait_for(lambda: training.job.state == "", "the job ends")
    last = training.lines(0)[-1]["step"]
    report(f"torchx cancel: saved step {last} and over after {took:.1f} s")
    assert step_of(committed(training.folder / "run" / "checkpoints")[-1]) == last < STEPS
    # TorchX 0.7 cannot read this state, "CANCELLED by UID": its own status command fails.
    state = lambda: slurm.user("sacct", "-n", "-X", "-j", training.job.id, "-o", "State%20").split()  # noqa: E731
    training.job.wait_for(lambda: state()[:1] == ["CANCELLED"], "accounting knows it", 30)
    args = {"recipe": training.recipe, "run": training.folder / "run", "set": ";".join(SETTINGS), "resume": "true"}
    submit(slurm, training.folder / "jobs", "train", **args).succeeds()
    assert_equal_runs(training.folder / "run", training.undisturbed)
