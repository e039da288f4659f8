"""`triptych train` that is interrupted, loses a rank, or hangs: its words, its exit code, how it goes on; and nothing is left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import ROOT, TIMEOUT_SECONDS, succeeds
from tests.faults.campaign import assert_equal_runs
from tests.small import write_log

# 24 steps an epoch: long enough to be interrupted after some are logged.
RECIPE = [
    part
    for value in ("train.epochs=12", "train.log_every=1", "checkpoint.every_steps=30", "model.dropout=0.1")
    for part in ("--set", value)
]
STEPS = 288


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=3000)


@pytest.fixture(scope="module")
def undisturbed(log: Path) -> Path:
    succeeds("train", "--recipe", log, "--run", log.parent / "undisturbed", "--ranks", 2, *RECIPE)
    return log.parent / "undisturbed"


def processes(run: Path) -> dict[int, str]:
    """Command lines of living processes that name a run, by pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().replace("\0", " ")
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if str(run) in command and not is_zombie and int(folder.name) != os.getpid():
            found[int(folder.name)] = command
    return found


def pid_of_rank(run: Path, rank: int) -> int:
    for pid, command in processes(run).items():
        if "triptych.launch.train" in command and f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise AssertionError(f"rank {rank} is not there: {processes(run)}")


def wait_until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def is_training(run: Path) -> bool:
    """Some steps are logged."""
    path = run / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= 3


class Training:
    """`triptych train` in the background."""

    def __init__(self, log: Path, run: Path, *options: object) -> None:
        self.run = run
        args = ["train", "--recipe", log, "--run", run, "--ranks", 2, *RECIPE, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "triptych.launch.cli", *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def ends(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once nothing of it is left."""
        out, err = self.process.communicate(timeout=TIMEOUT_SECONDS)
        assert processes(self.run) == {}
        return self.process.returncode, out, err


@contextmanager
def training(log: Path, run: Path, *options: object) -> Iterator[Training]:
    started = Training(log, run, *options)
    try:
        wait_until(lambda: is_training(run) or started.process.poll() is not None, "training")
        yield started
    finally:
        for pid in processes(run):
            os.kill(pid, signal.SIGKILL)
        started.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_run_that_is_stopped_saves_and_goes_on_as_if_it_was_not(
    number: signal.Signals, log: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with training(log, tmp_path / "run") as started:
        started.process.send_signal(number)
        code, _, err = started.ends()
    assert code == 130
    first, last = err.strip().splitlines()
    assert first == "stopping: saving a checkpoint; press Ctrl-C again to end at once"
    assert last.startswith("triptych: stopped at step ") and last.endswith(" as asked, and saved; go on with --resume"), err
    step = int(last.split()[4])
    assert 0 < step < STEPS and (tmp_path / "run" / "checkpoints" / f"step_{step}").is_dir()
    assert f"epoch {step // 24 + 1}" in succeeds("train", "--recipe", log, "--run", tmp_path / "run", "--ranks", 2, *RECIPE, "--resume")
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_a_killed_rank_costs_a_restart(log: Path, undisturbed: Path, tmp_path: Path) -> None:
    with training(log, tmp_path / "run", "--restarts", 2) as started:
        wait_until(lambda: (tmp_path / "run" / "checkpoints" / "step_30").exists(), "a checkpoint")
        os.kill(pid_of_rank(tmp_path / "run", 1), signal.SIGKILL)
        code, out, err = started.ends()
    assert (code, err) == (0, ""), err
    assert "rank 1 was killed by signal 9; restarting all ranks from the last checkpoint (restart 1 of 2)\nresumed from" in out, out
    assert "restart 2" not in out
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_wrong_input_is_not_tried_again(log: Path, tmp_path: Path) -> None:
    spoiled = pq.read_table(log.parent / "train.parquet")
    clicks = [None, *spoiled.column("click").to_pylist()[1:]]
    pq.write_table(spoiled.set_column(spoiled.column_names.index("click"), "click", pa.array(clicks)), tmp_path / "train.parquet")
    run = tmp_path / "run"
    with training(log, run, "--restarts", 2, "--set", f"data.train={tmp_path / 'train.parquet'}") as started:
        code, out, err = started.ends()
    assert code == 2 and err.count("\n") == 1 and "1 nulls" in err, err
    assert "restarting" not in out
    written = {path: path.read_text() for path in run.rglob("attempt_[12]/*/std*.log")}
    assert written and not any(written.values()), "a later attempt did something"


def test_a_stopped_rank_is_named_and_ended(log: Path, tmp_path: Path) -> None:
    with training(log, tmp_path / "run", "--set", "train.timeout_s=4") as started:
        os.kill(pid_of_rank(tmp_path / "run", 1), signal.SIGSTOP)
        began = time.monotonic()
        code, _, err = started.ends()
        seconds = time.monotonic() - began
    assert code == 1 and err.count("\n") == 1, err
    assert re.match(r"triptych: rank 1 hangs: \d+ s without a sign of life, last in '[a-z0-9 ,]+'; ", err), err
    assert "train.timeout_s (4)" in err and err.rstrip().endswith(f"its log is under {tmp_path / 'run' / 'logs'}")
    assert seconds < 30


@pytest.mark.long
def test_a_second_signal_ends_what_cannot_save(log: Path, tmp_path: Path) -> None:
    with training(log, tmp_path / "run") as started:
        os.kill(pid_of_rank(tmp_path / "run", 1), signal.SIGSTOP)
        started.process.send_signal(signal.SIGINT)
        assert started.process.stderr is not None
        while "stopping: " not in started.process.stderr.readline():
            assert started.process.poll() is None
        started.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code, _, err = started.ends()
        assert time.monotonic() - began < 15
    assert code == 130 and err == "triptych: interrupted; a training goes on from its last checkpoint with --resume\n"


@pytest.mark.long
def test_a_stop_before_training_has_nothing_to_save(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = Training(log, run)
    wait_until(lambda: any("RANK=0" in Path(f"/proc/{pid}/environ").read_text() for pid in processes(run)), "a rank")
    assert not is_training(run)
    started.process.send_signal(signal.SIGTERM)
    code, _, err = started.ends()
    assert code == 130 and err.endswith("triptych: interrupted; a training goes on from its last checkpoint with --resume\n")
    assert not list((run / "checkpoints").iterdir())


def test_kill_9_leaves_no_rank(log: Path, tmp_path: Path) -> None:
    with training(log, tmp_path / "run") as started:
        assert len(processes(tmp_path / "run")) > 2
        os.kill(started.process.pid, signal.SIGKILL)
        wait_until(lambda: not processes(tmp_path / "run"), "all gone")
        assert started.process.wait() == -signal.SIGKILL


@pytest.mark.long
@pytest.mark.parametrize("module", ["triptych.launch.node", "triptych.launch.nodes.torchrun"])
def test_ranks_do_not_outlive_what_started_them(module: str, log: Path, tmp_path: Path) -> None:
    with training(log, tmp_path / "run", "--restarts", 2) as started:
        torchrun = [pid for pid, command in processes(tmp_path / "run").items() if f" -m {module} " in command]
        os.kill(torchrun[0], signal.SIGKILL)
        code, _, err = started.ends()
    assert code == 1 and err, err
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps and max(steps) < STEPS
