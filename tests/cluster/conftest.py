"""Hosts and a Slurm cluster for the tests; and what they measured, shown at the end: what was done, and how it came back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.cluster import hosts as of_namespaces
from tests.cluster import slurm as of_hosts
from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm

_MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three, which the tests of a file share."""
    if reason := of_namespaces.why_not():
        pytest.skip(reason)
    with Hosts(["n1", "n2", "n3"]) as made:
        yield made


@pytest.fixture
def two_hosts() -> Iterator[Hosts]:
    """For one test alone, which may change them."""
    if reason := of_namespaces.why_not():
        pytest.skip(reason)
    with Hosts(["n1", "n2"]) as made:
        yield made


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of two nodes, which the tests of a file share."""
    if reason := of_hosts.why_not():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Show a line at the end of the test run."""
    return request.config.stash.setdefault(_MEASURED, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_MEASURED, []):
        terminalreporter.write_line(f"measured: {line}")
