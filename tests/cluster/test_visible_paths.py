"""Paths that another node does not see: the job ends at once, on all nodes with exit code 2, and names path, node and cure."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.launches import Ended, Launch
from tests.command import succeeds
from tests.small import write_log
from triptych.launch.nodes import visible
from triptych.launch.nodes.mirror import CACHE

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
NODES = ("n1", "n2")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(NODES) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture
def hidden(hosts: Hosts) -> Iterator[list[Path]]:
    """Folders over which the second node mounts one of its own, for as long as a test runs."""
    mounted: list[Path] = []
    yield mounted
    for folder in mounted:
        hosts["n2"].run("umount", folder)


def hide(hosts: Hosts, folder: Path, hidden: list[Path]) -> None:
    hosts["n2"].run("mount", "-t", "tmpfs", "tmpfs", folder)
    hidden.append(folder)


def over_two_nodes(hosts: Hosts, logs: Path, module: str, *args: object, **env: str) -> list[Ended]:
    """A rank on each of the two nodes; the first on the first, as torchrun sorts them by their addresses."""
    nodes = [hosts[name] for name in NODES]
    with Launch(nodes, 1, args, logs, module=f"triptych.launch.{module}", endpoint=hosts.addresses["n1"], env=env) as launch:
        return launch.ended()


def refusal(ended: list[Ended]) -> str:
    """The one line that both nodes end with."""
    said = [[line for line in each.log.splitlines() if line.startswith("triptych: ")] for each in ended]
    assert all(len(lines) == 1 for lines in said) and said[0] == said[1], ended
    assert all(each.code == 2 for each in ended), ended
    return said[0][0].removeprefix("triptych: ")


def test_training_over_two_nodes_and_at_a_url_with_their_own_folders(hosts: Hosts, log: Path, tmp_path: Path, hidden: list[Path]) -> None:
    (cache := tmp_path / "cache").mkdir()
    hide(hosts, cache, hidden)
    for run in (str(tmp_path / "run"), f"local://{tmp_path / 'url'}"):
        ended = over_two_nodes(hosts, tmp_path / "logs", "train", "--recipe", log, "--run-dir", run, **{CACHE: str(cache)})
        assert [each.code for each in ended] == [0, 0], ended
    files = [sorted(path.name for path in (tmp_path / name).rglob("*.safetensors")) for name in ("run", "url")]
    assert files[0] == files[1] == ["rank_0.0.safetensors", "rank_1.0.safetensors"]
    for name in files[0]:
        of_run, of_url = (next((tmp_path / run).rglob(name)).read_bytes() for run in ("run", "url"))
        assert of_run == of_url
    assert not list((tmp_path / "run").glob(visible.PROBE + "*"))
    data = ("--data", "valid.parquet", "--json")
    ended = over_two_nodes(
        hosts, tmp_path / "logs2", "evaluate", "--run-dir", f"local://{tmp_path / 'url'}", *data, tmp_path / "m.json", **{CACHE: str(cache)}
    )
    assert [each.code for each in ended] == [0, 0] and (tmp_path / "m.json").is_file(), ended


@pytest.mark.parametrize("kind", ["another folder", "none"])
def test_a_run_folder(hosts: Hosts, log: Path, tmp_path: Path, hidden: list[Path], kind: str) -> None:
    run = tmp_path / "storage/run"
    run.mkdir(parents=True)
    hide(hosts, run if kind == "another folder" else run.parent, hidden)
    began = time.monotonic()
    ended = over_two_nodes(hosts, tmp_path / "logs", "train", "--recipe", log, "--run-dir", run)
    said = (
        "on node n2 this is another folder than on node n1" if kind == "another folder" else "node n2 does not see this folder of node n1"
    )
    assert refusal(ended) == f"{run}: {said}; {visible.ADVICE}"
    assert time.monotonic() - began < 60
    assert not list(run.iterdir())


@pytest.mark.parametrize("kind", ["missing", "another"])
def test_data(hosts: Hosts, log: Path, tmp_path: Path, hidden: list[Path], kind: str) -> None:
    (data := tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        shutil.copy(log.parent / f"{name}.parquet", data)
    hide(hosts, data, hidden)
    if kind == "another":
        hosts["n2"].run("cp", log.parent / "valid.parquet", data / "train.parquet")
    args = ("--recipe", log, "--run-dir", tmp_path / "run", "--set", f"data.root={data}")
    ended = over_two_nodes(hosts, tmp_path / "logs", "train", *args)
    sizes = [os.stat(log.parent / f"{name}.parquet").st_size for name in ("valid", "train")]
    assert refusal(ended) == (
        f"{data}/train.parquet: node n2 does not see this file of node n1; {visible.ADVICE}"
        if kind == "missing"
        else f"{data}/train.parquet: {sizes[0]} bytes on node n2, {sizes[1]} on node n1; bring the same files to both, or {visible.ADVICE}"
    )


def test_a_recipe(hosts: Hosts, log: Path, tmp_path: Path, hidden: list[Path]) -> None:
    (folder := tmp_path / "recipes").mkdir()
    shutil.copy(log, folder / "small.toml")
    hide(hosts, folder, hidden)
    ended = over_two_nodes(hosts, tmp_path / "logs", "train", "--recipe", folder / "small.toml", "--run-dir", tmp_path / "run")
    said = refusal(ended)
    assert str(folder / "small.toml") in said and said.endswith("(on n2)")


@pytest.mark.long
def test_runs_that_others_use(hosts: Hosts, log: Path, tmp_path: Path, hidden: list[Path]) -> None:
    """A run that is evaluated, one that a new one starts from, and the folder of an export."""
    (storage := tmp_path / "storage").mkdir()
    succeeds("train", "--recipe", log, "--run", storage / "run")
    newest = next((storage / "run/checkpoints").iterdir())
    (out := tmp_path / "out").mkdir()
    hide(hosts, out, hidden)
    ended = over_two_nodes(hosts, tmp_path / "logs1", "export", "--run-dir", storage / "run", "--out", out / "vectors")
    assert refusal(ended) == f"{out}: on node n2 this is another folder than on node n1; {visible.ADVICE}"
    hide(hosts, newest, hidden)
    for number, (module, *args) in enumerate(
        (
            ("evaluate", "--run-dir", storage / "run", "--data", "valid.parquet"),
            ("predict", "--run-dir", storage / "run", "--data", "valid.parquet", "--out", tmp_path / "p.parquet"),
            ("train", "--recipe", log, "--run-dir", tmp_path / "new", "--set", f"checkpoint.start_from={storage / 'run'}"),
        )
    ):
        ended = over_two_nodes(hosts, tmp_path / f"logs_{number}", module, *args)
        assert refusal(ended) == f"{newest}/manifest.json: node n2 does not see this file of node n1; {visible.ADVICE}"
    hide(hosts, storage, hidden)
    ended = over_two_nodes(hosts, tmp_path / "logs3", "evaluate", "--run-dir", storage / "run", "--data", "valid.parquet")
    said = refusal(ended)
    assert said.startswith(f"{storage / 'run'}: no run there") and said.endswith("(on n2)")
    hosts["n2"].run("umount", hidden.pop())
    hosts["n2"].run("umount", hidden.pop())
