"""Training on two hosts that fails on one: the last line on the other says which rank, where, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import Ended, Launch, num_lines
from tests.small import write_log
from triptych.launch.nodes.facts import starts


@contextmanager
def nodes(hosts: Hosts, tmp_path: Path, module: str, *args: object, restarts: int = 0) -> Iterator[Launch]:
    """The launcher on both hosts, with one rank each."""
    both, env = [hosts["n1"], hosts["n2"]], {"TMPDIR": str(tmp_path)}
    with Launch(both, 1, args, tmp_path / "logs", module=module, restarts=restarts, env=env) as launch:
        yield launch


def last_lines(ended: list[Ended]) -> list[str]:
    for each in ended:
        assert not re.search(r"ChildFailedError|torch/distributed/elastic|\.cpp:\d+\]|frame #\d+", each.log), each.log
    return [each.log.splitlines()[-1] for each in ended]


def test_an_exception_is_the_last_line_of_both(hosts: Hosts, tmp_path: Path) -> None:
    with nodes(hosts, tmp_path, "tests.hanging_rank", "raising", 600) as launch:
        ended = launch.ended()
    first, second = last_lines(ended)
    assert [each.code for each in ended] == [1, 1] and first == second
    assert re.fullmatch(
        r"triptych: rank 1 on n[12] failed in '[a-z ]+': ArrowNotImplementedError: .* \(datasets/ids\.py:\d+ \w+\)", first
    ), first


def test_wrong_input_on_one_is_not_tried_again_by_the_other(hosts: Hosts, tmp_path: Path) -> None:
    with nodes(hosts, tmp_path, "tests.hanging_rank", "refusing", 600, restarts=2) as launch:
        ended = launch.ended()
    assert [each.code for each in ended] == [2, 2], [each.log for each in ended]
    assert last_lines(ended) == ["triptych: rows.parquet: no such column"] * 2
    assert "restarting" not in ended[0].log + ended[1].log


@pytest.mark.parametrize("host", ["n1", "n2"])
def test_a_killed_rank_is_named_on_both(hosts: Hosts, tmp_path: Path, host: str) -> None:
    """Also where it kept the store in which ranks leave their last words."""
    recipe, run = write_log(tmp_path / "log", train_rows=1500), tmp_path / "run"
    options = ["--recipe", recipe, "--run-dir", run, "--set", "train.epochs=300", "--set", "train.log_every=1"]
    with nodes(hosts, tmp_path, "triptych.launch.train", *options) as launch:
        launch.wait_until(lambda: num_lines(run / "metrics.jsonl") >= 3, 120)
        (start,) = starts(run)
        assert start["nodes"] == 2
        victim = {rank["host"]: rank for rank in start["ranks"]}[host]
        hosts[host].run("kill", "-9", victim["pid"])
        ended = launch.ended()
    assert [each.code for each in ended] == [1, 1]
    name, at = f"rank {victim['rank']} on {host}", f"a rank on {hosts.addresses[host]}"
    said = dict(zip(("n1", "n2"), last_lines(ended), strict=True))
    assert said.pop(host) == f"triptych: {name} was killed by signal 9 (out of memory?)"
    (other,) = said.values()
    assert other in [f"triptych: {who} went without a word: killed, or the node is gone" for who in (name, at)]
