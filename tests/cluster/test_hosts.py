"""Training over several hosts: as on one, whatever the hosts call themselves, and through the loss of ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import NETWORK, Host, Hosts
from tests.cluster.launches import Launch, num_lines
from tests.faults.campaign import Campaign, assert_equal_runs
from tests.small import write_log

NAMES = ["n1", "n2", "n3"]
ADDRESSES = {name: f"{NETWORK}.{11 + number}" for number, name in enumerate(NAMES)}
SAVE_EVERY = 5
SETTINGS = ["train.timeout_s=60", f"checkpoint.every_steps={SAVE_EVERY}", "checkpoint.keep=2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=1900)


def args_of(recipe: Path, run: Path, settings: list[str] = SETTINGS) -> list[object]:
    return ["--recipe", recipe, "--run-dir", run, *(word for setting in settings for word in ("--set", setting))]


def one_host(host: Host, nodes: int, recipe: Path, run: Path) -> Path:
    """The run of as many torchruns, all on one host."""
    with Launch([host] * nodes, 1, args_of(recipe, run), run.with_name(f"{run.name}.logs")) as launch:
        launch.succeeds()
    return run


@pytest.fixture(scope="module")
def on_one(hosts: Hosts, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_host(hosts["n1"], 2, recipe, tmp_path_factory.mktemp("one") / "run")


def test_three_hosts_train_as_one(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    with Launch([hosts[name] for name in NAMES], 1, args_of(recipe, tmp_path / "run"), tmp_path / "logs") as launch:
        launch.succeeds()
    assert_equal_runs(tmp_path / "run", one_host(hosts["n1"], 3, recipe, tmp_path / "one"))


def named_localhost_and_as_a_bridge(hosts: Hosts) -> str:
    hosts["n1"].resolve("127.0.0.1 n1", f"{ADDRESSES['n2']} n2")
    hosts["n2"].resolve("172.17.0.1 n2", f"{ADDRESSES['n1']} n1")
    hosts["n2"].add_bridge("docker0", "172.17.0.1/16")
    return "n1"


def without_names(hosts: Hosts) -> str:
    hosts["n1"].resolve()
    hosts["n2"].resolve()
    return ADDRESSES["n1"]


def with_ipv6_alone(hosts: Hosts) -> str:
    """And names of their own as Debian gives them."""
    for number, name in ((1, "n1"), (2, "n2")):
        hosts[name].run("ip", "-4", "address", "flush", "dev", "eth0")
        hosts[name].run("ip", "address", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")
        hosts[name].resolve(f"127.0.1.1 {name}", *(f"fd77::{other} n{other}" for other in (1, 2) if other != number))
    return "n1"


@pytest.mark.parametrize(
    "trap", [named_localhost_and_as_a_bridge, *(pytest.param(trap, marks=pytest.mark.long) for trap in (without_names, with_ipv6_alone))]
)
def test_hosts_whose_names_mislead(trap: Callable[[Hosts], str], recipe: Path, on_one: Path, tmp_path: Path) -> None:
    with Hosts(["n1", "n2"]) as hosts:
        endpoint = trap(hosts)
        both = [hosts["n1"], hosts["n2"]]
        with Launch(both, 1, args_of(recipe, tmp_path / "run"), tmp_path / "logs", endpoint=endpoint) as launch:
            launch.succeeds()
    assert_equal_runs(tmp_path / "run", on_one)


def test_a_node_that_fails_before_it_meets_the_others_tells_them(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    """With the default of half an hour that ranks wait for each other."""
    with Launch([], 2, args_of(recipe, tmp_path / "run", []), tmp_path / "logs", endpoint="n1", nodes=2) as launch:
        launch.add(hosts["n1"])
        launch.add(hosts["n2"], GLOO_SOCKET_IFNAME="ib0")
        ended = launch.ended(60)
    for each in ended:
        told = {line for line in each.log.splitlines() if line.startswith("triptych: ") and "asked to stop" not in line}
        assert told == {"triptych: GLOO_SOCKET_IFNAME=ib0: there is no interface ib0; there are eth0, lo (on n2)"}, each.log
        assert each.code == 2 and each.log.splitlines()[-1] in told


def test_a_killed_rank_of_another_host(hosts: Hosts, recipe: Path, on_one: Path, tmp_path: Path, report: Callable[[str], None]) -> None:
    both, env = [hosts["n1"], hosts["n2"]], {"LEDGERS": str(tmp_path)}
    args = args_of(recipe, tmp_path / "run")
    with Launch(both, 1, args, tmp_path / "logs", module="tests.cluster.rank", restarts=1, env=env) as launch:
        launch.wait_until(lambda: num_lines(tmp_path / "ledger.00.00.0.jsonl") > 8)
        (rank,) = hosts["n2"].run("pgrep", "-f", "python[0-9.]* -u -m tests.cluster.rank").split()
        killed = time.time()
        hosts["n2"].run("kill", "-KILL", rank)
        launch.succeeds()
    again = [json.loads(line) for line in (tmp_path / "ledger.00.01.0.jsonl").read_text().splitlines()]
    report(f"SIGKILL of a rank on another host: next step {again[1]['time'] - killed:.0f} s after")
    Campaign(tmp_path, recipe, SETTINGS, [], on_one, global_batch=2 * 64).check_rows()
    assert_equal_runs(tmp_path / "run", on_one)
