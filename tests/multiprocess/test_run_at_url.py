"""A run at a URL equals a run in a folder, whatever it is killed at and wherever it goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.at_url import assert_equal_states, assert_same_checkpoints, state_of, train_there, trainer, url_of
from tests.faults.campaign import assert_equal_runs
from tests.ranks import run_on_ranks
from tests.runs import local_values
from tests.small import write_log
from triptych.launch.build import model_state
from triptych.launch.checkpoints.manifest import MANIFEST, committed, step_of
from triptych.launch.distributed import Ranks
from triptych.launch.nodes.remote import WRITING, RemoteFolder
from triptych.launch.trainer import Trainer

WRITES = ("put", "write", "move", "delete", "delete_folder")
"""What changes a URL."""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


def test_it_equals_a_run_in_a_folder(log: Path, tmp_path: Path) -> None:
    in_folder = run_on_ranks(2, train_there, log, str(tmp_path / "folder"), tmp_path / "none")
    at_url = run_on_ranks(2, train_there, log, url_of(tmp_path / "url"), tmp_path / "cache")
    for found, expected in zip(at_url, in_folder, strict=True):
        assert_equal_states(found, expected)
    assert_equal_runs(tmp_path / "url", tmp_path / "folder")
    assert_same_checkpoints(tmp_path / "url", tmp_path / "folder")
    steps = [step_of(path) for path in committed(tmp_path / "url/checkpoints")]
    best = json.loads((tmp_path / "url/result.json").read_text())["step"]
    assert set(steps) == {*steps[-2:], best} and len(steps) in (2, 3)
    assert not (tmp_path / "none").exists()


class Killed(BaseException):
    """Nothing is done after it, as after SIGKILL."""


class Writes:
    """Counts what changes a URL; dies at one of them, before it, or with half of a file written."""

    def __init__(self, dies_at: int | None = None, *, half: bool = False) -> None:
        self.count, self.dies_at, self.half = 0, dies_at, half

    @contextmanager
    def watched(self) -> Iterator[None]:
        originals = {name: getattr(RemoteFolder, name) for name in WRITES}
        for name, original in originals.items():
            setattr(RemoteFolder, name, self._counting(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(RemoteFolder, name, original)

    def _counting(self, kind: str, original: Callable[..., None]) -> Callable[..., None]:
        def counted(remote: RemoteFolder, *args: Any) -> None:
            self.count += 1
            if self.dies_at is not None and self.count >= self.dies_at:
                if kind == "put" and self.half:
                    whole = args[0].read_bytes()
                    target = Path(remote.url_of(args[1]).removeprefix("local://") + WRITING)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(whole[: len(whole) // 2])
                raise Killed
            original(remote, *args)

        return counted


def killed_everywhere(ranks: Ranks, log: Path, folder: Path, first: int, every: int) -> tuple[int, int]:
    """Kill a training at each `every`th change of the URL, resume it in a fresh cache, and compare; the number of changes, and of kills."""
    whole = Writes()
    with whole.watched():
        undisturbed = trainer(ranks, log, url_of(folder / "whole"), folder / "cache", resume=False, checkpoint__background=False)
        undisturbed.fit()
    kills = range(first, whole.count + 1, every)
    for number in kills:
        run = folder / f"killed_{number}"
        try:
            with Writes(number, half=number % 2 == 0).watched():
                victim = trainer(ranks, log, url_of(run), folder / f"a_{number}", resume=False, checkpoint__background=False)
                victim.fit()
            raise AssertionError(f"lived through change {number}")
        except Killed:
            pass
        begin = max([step_of(path) for path in committed(run / "checkpoints") if (path / MANIFEST).exists()], default=0)
        again = trainer(ranks, log, url_of(run), folder / f"b_{number}", resume=True, checkpoint__background=False)
        assert again.step == begin, number
        again.fit()
        assert_equal_states(state_of(again), state_of(undisturbed))
        assert_equal_runs(run, folder / "whole")
        assert_same_checkpoints(run, folder / "whole")
        for path in folder.glob(f"*_{number}"):
            shutil.rmtree(path)
    return whole.count, len(kills)


def test_a_run_that_is_killed_goes_on_in_another_place(log: Path, tmp_path: Path) -> None:
    changes, kills = run_on_ranks(1, killed_everywhere, log, tmp_path, 5, 17)[0]
    assert kills >= 4 and changes > 60


@pytest.mark.long
def test_it_goes_on_whatever_change_it_is_killed_at(log: Path, tmp_path: Path) -> None:
    changes, kills = run_on_ranks(1, killed_everywhere, log, tmp_path, 1, 1, timeout=900)[0]
    assert kills == changes > 60


class Stops(Trainer):
    """Is asked to stop after five steps, as by SIGTERM."""

    def _look_at(self, report: Any) -> None:
        super()._look_at(report)
        if self.step == 5:
            self.stop.ask()


def as_on_two_nodes(ranks: Ranks, log: Path, folder: Path) -> tuple[dict[str, Any], list[str], int, list[str]]:
    """A run that stops, and goes on after one node lost its folder and the other has that of an older step."""
    cache = folder / f"node_{ranks.rank}"
    first = trainer(ranks, log, url_of(folder / "url"), cache, resume=False, kind=Stops, data__batch_size=32)
    assert first.mirror is not None and first.mirror.leads and not first.fit()
    held = sorted(path.name for path in (first.checkpoints / f"step_{first.step}").iterdir())
    if ranks.is_first:
        first.lock.close()
    else:
        shutil.rmtree(cache)
    fetched: list[str] = []
    original = RemoteFolder.fetch

    def fetch(remote: RemoteFolder, name: str, path: Path) -> tuple[int, str]:
        fetched.append(name)
        return original(remote, name, path)

    RemoteFolder.fetch = fetch  # type: ignore[method-assign]
    second = trainer(ranks, log, url_of(folder / "url"), cache, resume=True, data__batch_size=32)
    begin = second.step
    second.fit()
    RemoteFolder.fetch = original  # type: ignore[method-assign]
    steps = sorted(path.name for path in second.checkpoints.iterdir())
    at_url = sorted(os.listdir(folder / "url/checkpoints"))
    assert set(steps) <= set(at_url) and (steps == at_url or not ranks.is_first), steps
    return state_of(second), held, begin, [name for name in fetched if name.endswith(".safetensors")]


def test_nodes_have_folders_of_their_own_and_fetch_what_they_lack(log: Path, tmp_path: Path) -> None:
    expected = run_on_ranks(2, train_there, log, str(tmp_path / "folder"), tmp_path / "none", 32)
    found = run_on_ranks(2, as_on_two_nodes, log, tmp_path)
    for rank, (state, held, begin, fetched) in enumerate(found):
        assert_equal_states(state, expected[rank])
        assert begin >= 5 and held == [MANIFEST, f"rank_{rank}.0.safetensors"]
        lacked = [1] if rank == 0 else [0, 1]  # the first one kept its own
        assert sorted(fetched) == [f"checkpoints/step_{begin}/rank_{number}.0.safetensors" for number in lacked]
    assert_equal_runs(tmp_path / "url", tmp_path / "folder")


def start_elsewhere(ranks: Ranks, log: Path, folder: Path, run: Path) -> list[dict[str, Any]]:
    """New runs that start from a run, and from a checkpoint of it: from its folder, and from its URL."""
    found = []
    newest = committed(run / "checkpoints")[-1].name
    for number, start in enumerate((str(run), url_of(run), f"{run}/checkpoints/{newest}", f"{url_of(run)}/checkpoints/{newest}")):
        begun = trainer(ranks, log, str(folder / f"run_{number}"), folder / "cache", resume=False, checkpoint__start_from=start)
        found.append(local_values(model_state(begun.built)) | {"listing": json.loads((begun.run / "start_from.json").read_text())})
    return found


def test_a_run_starts_from_a_url(log: Path, tmp_path: Path) -> None:
    run_on_ranks(1, train_there, log, str(tmp_path / "run"), tmp_path / "none")
    results = run_on_ranks(1, start_elsewhere, log, tmp_path, tmp_path / "run")[0]
    for from_folder, from_url in (results[:2], results[2:]):
        listings = from_folder.pop("listing"), from_url.pop("listing")
        assert listings[1].pop("checkpoint") == url_of(Path(listings[0].pop("checkpoint"))) and listings[0] == listings[1]
        assert_equal_states(from_url, from_folder)
