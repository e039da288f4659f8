"""A host that loses power tells nobody, and only the ranks watch it: those on the other host end in time, and say whom they lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import Launch
from tests.small import write_log
from triptych.launch.nodes.facts import starts

TIMEOUT_S = 90
LOST_AFTER_S = TIMEOUT_S / 6


@pytest.mark.parametrize("lost", ["n1", pytest.param("n2", marks=pytest.mark.long)])
def test_the_other_host_ends_and_names_it(two_hosts: Hosts, tmp_path: Path, lost: str, report: Callable[[str], None]) -> None:
    """Also where it kept the rendezvous, as n1 does, or the store."""
    names = ["n1", "n2"]
    recipe, run = write_log(tmp_path / "log", train_rows=1500), tmp_path / "run"
    options = ["--set", "train.epochs=1000", "--set", "train.log_every=1", "--set", f"train.timeout_s={TIMEOUT_S}"]
    args = ["--recipe", recipe, "--run-dir", run, *options]
    with Launch([two_hosts[name] for name in names], 1, args, tmp_path / "logs", env={"TMPDIR": str(tmp_path)}) as launch:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 5:
            assert time.monotonic() < deadline, launch.log(0)
            time.sleep(0.1)
        two_hosts[lost].off()
        off = time.monotonic()
        left = names.index(lost) ^ 1
        code = launch.processes[left].wait(TIMEOUT_S)  # before a hanging run would be ended
        took = time.monotonic() - off
    (start,) = starts(run)
    rank = {each["host"]: each["rank"] for each in start["ranks"]}[lost]
    last = launch.log(left).splitlines()[-1]
    silent = f"rank {rank} on {lost} gave no sign of life"
    no_store = f"the store where ranks met, on {two_hosts.addresses[lost]}, gave no answer"
    assert code == 1 and last in [
        f"triptych: {who} for {LOST_AFTER_S:.0f} s: that host is lost, or the network to it" for who in (silent, no_store)
    ]
    assert took > LOST_AFTER_S
    report(f"{lost} without power, train.timeout_s={TIMEOUT_S}: the other host ended after {took:.0f} s")
