"""Hosts that go. One that loses power tells nobody; only ranks watch it: those on the other host end in time, and say whom they lost."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import Launch, num_lines
from tests.small import write_log
from triptych.launch.nodes.facts import starts

TIMEOUT_S = 90
LOST_AFTER_S = TIMEOUT_S / 6


def training(hosts: Hosts, tmp_path: Path, restarts: int = 0) -> tuple[Launch, Path]:
    """Over both hosts, for longer than any test; and its metrics."""
    recipe, run = write_log(tmp_path / "log", train_rows=1500), tmp_path / "run"
    options = ["train.epochs=1000", "train.log_every=1", "checkpoint.every_steps=10", f"train.timeout_s={TIMEOUT_S}"]
    args = ["--recipe", recipe, "--run-dir", run, *(word for option in options for word in ("--set", option))]
    env = {"TMPDIR": str(tmp_path)}
    return Launch([hosts["n1"], hosts["n2"]], 1, args, tmp_path / "logs", restarts=restarts, env=env), run / "metrics.jsonl"


def without_power(lost: str, hosts: Hosts, launch: Launch, metrics: Path) -> tuple[int, str, float]:
    """Take it from a host of two; returns the other launcher's exit code and last line, and after how many seconds it ended."""
    launch.wait_until(lambda: num_lines(metrics) >= 5)
    hosts[lost].off()
    off = time.monotonic()
    left = ["n1", "n2"].index(lost) ^ 1
    code = launch.processes[left].wait(TIMEOUT_S)  # before a hanging run would be ended
    return code, launch.log(left).splitlines()[-1], time.monotonic() - off


@pytest.mark.parametrize("lost", ["n1", pytest.param("n2", marks=pytest.mark.long)])
def test_the_other_host_ends_and_names_it(two_hosts: Hosts, tmp_path: Path, lost: str, report: Callable[[str], None]) -> None:
    """Also where it kept the rendezvous, as n1 does, or the store."""
    launch, metrics = training(two_hosts, tmp_path)
    with launch:
        code, last, took = without_power(lost, two_hosts, launch, metrics)
    (start,) = starts(metrics.parent)
    rank = {each["host"]: each["rank"] for each in start["ranks"]}[lost]
    silent = f"rank {rank} on {lost} gave no sign of life"
    no_store = f"the store where ranks met, on {two_hosts.addresses[lost]}, gave no answer"
    assert code == 1 and last in [
        f"triptych: {who} for {LOST_AFTER_S:.0f} s: that node is lost, or the network to it" for who in (silent, no_store)
    ]
    assert took > LOST_AFTER_S
    report(f"{lost} without power, train.timeout_s={TIMEOUT_S}: the other host ended after {took:.0f} s")


@pytest.mark.long
def test_with_restarts_it_may_come_back(two_hosts: Hosts, tmp_path: Path, report: Callable[[str], None]) -> None:
    """As one that keeps no rendezvous may, though it kept the ranks' store: all go on from the last checkpoint."""
    launch, metrics = training(two_hosts, tmp_path, restarts=1)
    with launch:
        launch.wait_until(lambda: num_lines(metrics) >= 30)
        two_hosts["n2"].off()
        off, before = time.monotonic(), num_lines(metrics)
        launch.wait_until(lambda: "restarting all ranks" in launch.log(0), numbers=[0])
        two_hosts.switch_on("n2")
        launch.add(two_hosts["n2"])
        on = time.monotonic()
        launch.wait_until(lambda: num_lines(metrics) != before, 120, numbers=[0, 2])
        next_step = time.monotonic()
        launch.wait_until(lambda: num_lines(metrics) > before + 20, numbers=[0, 2])
    (resumed,) = re.findall(r"resumed .*step_(\d+)", launch.log(0) + launch.log(2))
    report(f"n2 without power, restarts 1: back after {on - off:.0f} s, next step {next_step - on:.0f} s after, from step {resumed}")


@pytest.mark.long
def test_with_restarts_nobody_waits_for_a_lost_rendezvous(two_hosts: Hosts, tmp_path: Path, report: Callable[[str], None]) -> None:
    launch, metrics = training(two_hosts, tmp_path, restarts=1)
    with launch:
        code, last, took = without_power("n1", two_hosts, launch, metrics)
    assert code == 1 and last.endswith("that node is lost, or the network to it"), last
    report(f"n1 without power, restarts 1: the other host ended after {took:.0f} s")


@pytest.mark.parametrize("restarts", [pytest.param(0, marks=pytest.mark.long), 1])
def test_where_one_node_is_asked_to_stop_both_end(two_hosts: Hosts, tmp_path: Path, restarts: int) -> None:
    """As when one pod is to go: the other node does not wait for it to come back."""
    launch, metrics = training(two_hosts, tmp_path, restarts)
    with launch:
        launch.wait_until(lambda: num_lines(metrics) >= 5)
        psutil.Process(launch.processes[1].pid).children()[0].send_signal(signal.SIGTERM)  # below the process that entered the host
        other, asked = launch.ended(60)
    saved = r"triptych: stopped at step \d+ as asked, and saved; go on with --resume"
    assert asked.code == 143 and re.fullmatch(saved, asked.log.splitlines()[-1]), asked.log
    last = other.log.splitlines()[-1]
    assert other.code == 1 and re.fullmatch(saved + "; this node was not asked, but another one, or torchrun ended its ranks", last), (
        other.log
    )
