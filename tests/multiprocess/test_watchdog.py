"""Ranks that get stuck under torchrun: the run ends in time and names who and where; ranks that work are left alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.command import ROOT
from tests.small import write_log
from triptych.launch.console import FAILURE_FILE
from triptych.launch.faults.reasons import Reason, reason_of
from triptych.launch.nodes.torchrun import is_there

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


def two_nodes(folder: Path, *args: object, meet_on: int = 0) -> list[subprocess.Popen[str]]:
    """torchrun twice, as on two nodes, with two ranks and one. They meet on the first, or the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    started: dict[int, subprocess.Popen[str]] = {}
    for node in (meet_on, 1 - meet_on):
        ranks = (2, 1)[node]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", FAILURE_FILE: str(folder / f"failure_{node}.json")}
        meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", endpoint]
        command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", str(ranks), "-m", "tests.hanging_rank"]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started[node] = subprocess.Popen([*command, *map(str, args)], cwd=ROOT, env=env, start_new_session=True, **out)  # type: ignore[call-overload]
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_there(endpoint) and time.monotonic() < deadline:
            time.sleep(0.1)
    return [started[0], started[1]]


def ended(nodes: list[subprocess.Popen[str]], timeout_s: float) -> list[str]:
    """What those printed that ended in time; the others are killed."""
    deadline = time.monotonic() + timeout_s
    printed = []
    try:
        for node in nodes:
            printed.append(node.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
    except subprocess.TimeoutExpired:
        pass
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    return printed


def test_over_two_nodes_a_rank_that_works_is_left_alone(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path, "working", 6)
    printed = ended(nodes, SECONDS_TO_START + 30)
    assert [node.returncode for node in nodes] == [0, 0], printed


@pytest.mark.long  # test_lost_host.py takes a host its power
def test_a_node_without_a_sign_of_life_is_lost(tmp_path: Path) -> None:
    """Its ranks stand still, as when a host loses power. The others do not wait for the timeout."""
    began = time.monotonic()
    nodes = two_nodes(tmp_path, "still", 120)
    (printed,) = ended(nodes[:1], SECONDS_TO_START + 60)
    ended(nodes[1:], 0)
    reason = reason_of(tmp_path / "failure_0.json", 0)
    assert nodes[0].returncode == 1 and reason is not None and reason.kind == "lost" and not reason.is_final, printed
    assert re.fullmatch(r"ranks? \d+(, \d+)? on \S+ gave no sign of life for 20 s: that node is lost, or the network to it", reason.message)
    assert 20 < time.monotonic() - began < 120


def test_one_rank_of_a_node_that_stands_still_is_no_lost_node(tmp_path: Path) -> None:
    """It is named with its stage, as on one node."""
    nodes = two_nodes(tmp_path, "one still", 30)
    printed = ended(nodes, SECONDS_TO_START + 60)
    reasons = [reason_of(tmp_path / f"failure_{node}.json", 0) for node in range(2)]
    assert all(reason is not None and reason.kind == "hang" for reason in reasons), (reasons, printed)
    assert all("without a sign of life, last in 'thinking'" in str(reason) for reason in reasons), reasons


def test_the_other_node_says_it_too_where_nodes_meet_on_the_one_that_finds_it(tmp_path: Path) -> None:
    """Its torchrun takes the place where they meet with it: the other would end its ranks at once."""
    nodes = two_nodes(tmp_path, "one asked", 30, meet_on=1)
    printed = ended(nodes, SECONDS_TO_START + 30)
    reasons = [reason_of(tmp_path / f"failure_{node}.json", 0) for node in range(2)]
    assert all(reason is not None and reason.kind == "hang" for reason in reasons), (reasons, printed)
    assert all(re.search(r"rank \d on .* hangs: .* in 'thinking'.*it was asked to stop", str(reason)) for reason in reasons), reasons


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


@pytest.mark.long
def test_who_stood_still_counts_no_answer_of_that_time(tmp_path: Path) -> None:
    """The node that keeps the store stops first and goes on last, as nodes of a machine that is suspended may."""
    nodes = two_nodes(tmp_path, "working", 180)
    try:
        time.sleep(SECONDS_TO_START)
        torchruns = [psutil.Process(node.pid) for node in nodes]
        trees = [[torchrun, *torchrun.children(recursive=True)] for torchrun in torchruns]
        keeps = [any(process.environ().get("RANK") == "0" for process in tree) for tree in trees]
        keeper, other = trees[keeps.index(True)], trees[keeps.index(False)]
        for tree, number, seconds in [
            (keeper, signal.SIGSTOP, 5), (other, signal.SIGSTOP, 40), (other, signal.SIGCONT, 8), (keeper, signal.SIGCONT, 20),
        ]:  # fmt: skip
            for process in tree:
                process.send_signal(number)
            time.sleep(seconds)
        assert all(process.is_running() for tree in trees for process in tree)
        assert [reason_of(tmp_path / f"failure_{node}.json", 0) for node in range(2)] == [None, None]
    finally:
        ended(nodes, 0)
