"""The launcher on a node, as TorchX's command runs it: what it shows, its last line, its exit code, and that nothing outlives it."""

from __future__ import annotations

import hashlib
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

from tests.command import ROOT, TIMEOUT_SECONDS
from tests.small import write_log
from triptych.launch.console import FAILURE_FILE
from triptych.launch.nodes.facts import starts

LONG = ["--set", "train.epochs=300", "--set", "train.log_every=1"]
WALL = re.compile(r"ChildFailedError|torch/distributed/elastic|elastic_launch|\.cpp:\d+\]|frame #\d+|exitcode")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=1500)


@contextmanager
def node(tmp_path: Path, *args: object, ranks: int = 2) -> Iterator[subprocess.Popen[str]]:
    """The command of TorchX's dist.ddp, with the launcher in place of torchrun."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--rdzv_id", "test"]
    shape = ["--nnodes", "1", "--nproc_per_node", str(ranks), "--tee", "3", "--role", ""]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOGLEVEL": "WARNING", "TMPDIR": str(tmp_path)}
    env.pop(FAILURE_FILE, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "triptych.launch.node", *meeting, *shape, "-m", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr; none of which is the wall of the stack below."""
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert not WALL.search(out + err), out + err
    return process.returncode, out, err.splitlines()


def living(text: object) -> list[int]:
    """Processes whose command lines hold a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if str(text) in (folder / "cmdline").read_text() and not is_zombie:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_training(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 3


def training(log: Path, run: Path, *options: object) -> list[object]:
    return ["triptych.launch.train", "--recipe", log, "--run-dir", run, *options]


def test_a_training_shows_the_first_ranks_lines_and_leaves_run_json(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for options, epochs in (([], 1), (["--resume"], 2)):
        with node(tmp_path, *training(log, run, "--set", f"train.epochs={epochs}", *options)) as process:
            code, out, err = ended(process)
        assert (code, err) == (0, [])
        lines = out.splitlines()
        assert lines and all(line.startswith("[0]:") for line in lines), "only the first rank draws progress"
        assert any(line.startswith(f"[0]:train {12 * epochs}/{12 * epochs} epoch {epochs}/{epochs}") for line in lines)
    assert not list(tmp_path.glob("triptych_*")), "nothing is left of a start that went well"
    first, second = starts(run)
    assert (first["from_step"], second["from_step"]) == (0, 12)
    for start in (first, second):
        assert (start["command"], start["nodes"], start["world_size"]) == ("train", 1, 2)
        assert [(rank["rank"], rank["local_rank"], rank["host"]) for rank in start["ranks"]] == [
            (number, number, os.uname().nodename) for number in range(2)
        ]
        assert len({rank["pid"] for rank in start["ranks"]}) == 2
        assert start["scheduler"] == {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert second["recipe"]["sha256"] != first["recipe"]["sha256"]
    for name in ("plan", "recipe"):
        file = second[name]["file"]
        assert second[name]["sha256"] == hashlib.sha256((run / file).read_bytes()).hexdigest()


def test_wrong_input_is_one_line_and_exit_code_2(log: Path, tmp_path: Path) -> None:
    spoiled = pq.read_table(log.parent / "train.parquet")
    clicks = [None, *spoiled.column("click").to_pylist()[1:]]
    pq.write_table(spoiled.set_column(spoiled.column_names.index("click"), "click", pa.array(clicks)), tmp_path / "spoiled.parquet")
    with node(tmp_path, *training(log, tmp_path / "run", "--set", f"data.train={tmp_path / 'spoiled.parquet'}")) as process:
        code, out, err = ended(process)
    assert code == 2 and "train 1/" not in out
    assert err[-1].startswith(f"triptych: {tmp_path / 'spoiled.parquet'}: row group 0: label 'click' of task 'ctr' has 1 nulls"), err
    assert not any(line.startswith("Traceback") for line in err)


def test_the_error_of_a_failing_rank_comes_last(tmp_path: Path) -> None:
    with node(tmp_path, "tests.hanging_rank", "raising", 600) as process:
        code, _, err = ended(process)
    assert code == 1
    assert re.fullmatch(
        r"triptych: rank 1 failed in '[a-z ]+': ArrowNotImplementedError: Unsupported cast .* \(datasets/ids\.py:\d+ string_codes\)",
        err[-1],
    ), err
    assert "[1]:Traceback (most recent call last):" in err
    assert any(re.match(r"\[0\]:lost another rank in '[a-z ]+' \(launch/\w+\.py:\d+ ", line) for line in err)
    told = re.fullmatch(r"triptych: what torchrun said is in (\S+)", err[-2])
    assert told and "ChildFailedError" in Path(told[1]).read_text()


@pytest.mark.long
def test_a_killed_rank_comes_last(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with node(tmp_path, *training(log, run, *LONG)) as process:
        wait_until(lambda: is_training(run))
        rank = json.loads((run / "run.json").read_text())["starts"][0]["ranks"][1]
        os.kill(rank["pid"], signal.SIGKILL)
        code, _, err = ended(process)
    assert code == 1 and err[-1] == "triptych: rank 1 was killed by signal 9 (out of memory?)", err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_what_is_asked_to_stop_saves(number: signal.Signals, log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with node(tmp_path, *training(log, run, *LONG)) as process:
        wait_until(lambda: is_training(run))
        # A scheduler signals the processes of a job one by one; torchrun must not take what is passed on for a second request.
        for pid in living(run):
            os.kill(pid, number if pid == process.pid else signal.SIGTERM)
        code, _, err = ended(process)
    assert code == 143
    found = re.fullmatch(r"triptych: stopped at step (\d+) as asked, and saved; go on with --resume", err[-1])
    assert found and (run / "checkpoints" / f"step_{found[1]}").is_dir(), err


def test_kill_9_leaves_no_rank(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with node(tmp_path, *training(log, run, *LONG)) as process:
        wait_until(lambda: is_training(run))
        assert len(living(run)) == 4, "the launcher, torchrun and two ranks"
        process.kill()
        wait_until(lambda: not living(run))


def test_what_torchrun_cannot_read_is_shown(tmp_path: Path) -> None:
    with node(tmp_path, "tests.hanging_rank", "raising", 600, ranks=0) as process:
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1 and err.splitlines()[-1].startswith("triptych: torchrun ended with "), err
