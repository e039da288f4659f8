"""A slow link, lost packets and a wire that is pulled for some seconds change nothing but how long a training takes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Hosts
from tests.cluster.launches import Launch, num_lines
from tests.faults.campaign import assert_equal_runs
from tests.small import write_log

BATCH, STEPS = 32, 30
PULLED_S = 12
"""The store gives no answer meanwhile, but less than a sixth of the timeout: the other host is not lost."""
SETTINGS = ["train.timeout_s=180", "train.log_every=3", f"data.batch_size={BATCH}"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=2 * BATCH * STEPS)


@pytest.fixture
def both(two_hosts: Hosts) -> list[Host]:
    return [two_hosts["n1"], two_hosts["n2"]]


def launch(hosts: list[Host], recipe: Path, run: Path) -> Launch:
    args = ["--recipe", recipe, "--run-dir", run, *(word for setting in SETTINGS for word in ("--set", setting))]
    return Launch(hosts, 1, args, run.with_name("logs"))


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run over good wires."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with launch([hosts["n1"], hosts["n2"]], recipe, run) as launched:
        launched.succeeds()
    return run


def steps_per_second(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["rows_per_second"] for record in records if "rows_per_second" in record) / (2 * BATCH)


@pytest.mark.parametrize("rate", ["10mbit", *(pytest.param(rate, marks=pytest.mark.long) for rate in ("2mbit", "500kbit"))])
def test_slow(rate: str, both: list[Host], recipe: Path, undisturbed: Path, tmp_path: Path, report: Callable[[str], None]) -> None:
    for host in both:
        host.slow(rate)
    with launch(both, recipe, tmp_path / "run") as launched:
        launched.succeeds()
    sent = [host.sent() for host in both]
    assert all(each["overlimits"] > 100 and each["bytes"] > 1e6 for each in sent), f"nothing was slowed down: {sent}"
    assert_equal_runs(tmp_path / "run", undisturbed)
    report(f"link of {rate}: {steps_per_second(tmp_path / 'run'):.1f} steps/s; undisturbed {steps_per_second(undisturbed):.1f}")


def test_lost_packets(both: list[Host], recipe: Path, undisturbed: Path, tmp_path: Path, report: Callable[[str], None]) -> None:
    for host in both:
        host.lossy(3)
    with launch(both, recipe, tmp_path / "run") as launched:
        launched.succeeds()
    lost = [host.lost() for host in both]
    assert min(lost) > 20, lost
    assert_equal_runs(tmp_path / "run", undisturbed)
    report(f"3 % of packets lost ({lost}): {steps_per_second(tmp_path / 'run'):.1f} steps/s")


def test_a_wire_that_is_pulled_for_some_seconds(
    two_hosts: Hosts, both: list[Host], recipe: Path, undisturbed: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    with launch(both, recipe, tmp_path / "run") as launched:
        metrics = tmp_path / "run" / "metrics.jsonl"
        launched.wait_until(lambda: num_lines(metrics) >= 2)
        two_hosts.wire("n2", "down")
        time.sleep(PULLED_S)
        held, mended = metrics.read_text(), time.monotonic()
        assert not (tmp_path / "run" / "result.json").exists()
        two_hosts.wire("n2", "up")
        launched.wait_until(lambda: metrics.read_text() != held)
        report(f"wire pulled for {PULLED_S} s: went on {time.monotonic() - mended:.1f} s after")
        launched.succeeds()
    assert_equal_runs(tmp_path / "run", undisturbed)
