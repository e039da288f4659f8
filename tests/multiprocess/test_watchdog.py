"""Ranks that get stuck under torchrun: the run ends in time and names who and where; ranks that work are left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.command import ROOT
from tests.small import write_log
from triptych.launch.console import FAILURE_FILE
from triptych.launch.faults.reasons import Reason, reason_of

SECONDS_TO_START = 60
"""Imports of two ranks on a busy machine."""


class Ended(NamedTuple):
    code: int
    out: str
    reason: Reason | None


def torchrun(folder: Path, *args: object, ranks: int = 2, timeout_s: float) -> Ended:
    """Run tests/hanging_rank.py to its end, which must come within twice the timeout and some seconds once ranks have started."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", FAILURE_FILE: str(folder / "failure.json")}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.hanging_rank"]
    done = subprocess.run(
        [*start, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=SECONDS_TO_START + 2 * timeout_s, check=False
    )
    return Ended(done.returncode, done.stdout + done.stderr, reason_of(folder / "failure.json", 0))


def test_a_rank_whose_storage_does_not_answer_is_named_with_its_stage_and_place(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", train_rows=1500)
    ended = torchrun(tmp_path, "reading", 4, log, tmp_path / "run", timeout_s=4)
    assert ended.code == 1 and ended.reason is not None and ended.reason.kind == "hang", ended.out
    assert ended.reason.message.startswith("rank 1 hangs: "), ended.reason
    assert re.search(r" s in 'reading the batch of step 5' \(launch/\w+\.py:\d+ __iter__", ended.reason.message), ended.reason
    assert "train.timeout_s (4)" in ended.reason.message and "rank 0" not in ended.reason.message


@pytest.mark.parametrize("scene", ["working", "beside"])
def test_a_rank_that_works_longer_than_the_timeout_is_left_alone(scene: str, tmp_path: Path) -> None:
    ended = torchrun(tmp_path, scene, 2, timeout_s=6)
    assert ended.code == 0 and ended.reason is None, ended.out


def test_one_rank_alone_is_watched_too(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", train_rows=1500)
    ended = torchrun(tmp_path, "reading", 3, log, tmp_path / "run", ranks=1, timeout_s=3)
    assert ended.code == 1 and ended.reason is not None and "rank 0 hangs: " in ended.reason.message, ended.out


def test_after_sigterm_a_stuck_run_does_not_wait_for_the_timeout(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "asked", 20, timeout_s=10)
    assert ended.code == 1 and ended.reason is not None, ended.out
    assert ended.reason.message.startswith("rank 1 hangs: ") and "in 'thinking'" in ended.reason.message, ended.reason
    assert ended.reason.message.endswith("it was asked to stop")


def test_sigterm_ends_a_rank_at_once_that_has_nothing_to_save(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = torchrun(tmp_path, "early", 600, timeout_s=10)
    assert time.monotonic() - began < SECONDS_TO_START
    assert "exitcode  : 143" in ended.out and "asked to stop; ending at once" in ended.out, ended.out
    assert ended.reason is None


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "missing", 3, timeout_s=3)
    assert ended.code == 1 and ended.reason is not None, ended.out
    assert ended.reason.message == "of 2 ranks, 1 did not come within 3 s; their logs tell why"
    assert "Traceback" not in ended.out.partition("failed (exitcode")[0]


def test_a_ranks_own_error_is_not_hidden_by_those_that_lost_it(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "raising", 600, timeout_s=10)
    assert ended.code == 1 and ended.reason is not None and ended.reason.rank == 1, ended.out
    assert "(datasets/ids.py:" in ended.reason.message and ended.reason.message.endswith(" string_codes)")
    assert "gloo" not in ended.out, ended.out
    assert "failed (exitcode: 1) local_rank: 1" in ended.out
