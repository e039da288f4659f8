"""A run at a URL that is damaged, that another training writes to, or whose storage vanishes."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.at_url import state_of, train_there, trainer, url_of
from tests.faults.campaign import assert_equal_runs
from tests.ranks import run_on_ranks
from tests.small import write_log
from triptych.datasets.schema import InputError
from triptych.launch.checkpoints.manifest import DAMAGED, MANIFEST, committed, step_of
from triptych.launch.distributed import Ranks
from triptych.launch.nodes.mirror import CACHE, located
from triptych.launch.run_folder import load_run, read_fitted, read_recipe
from triptych.launch.trainer import Trainer


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def undisturbed(log: Path) -> Path:
    """A run in a folder, of one rank."""
    run_on_ranks(1, train_there, log, str(log.parent / "undisturbed"), log.parent / "none")
    return log.parent / "undisturbed"


def fails(work: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resume_damaged(ranks: Ranks, log: Path, folder: Path, run: Path) -> list[tuple[str, int, str]]:
    """For each kind of damage: what evaluating says, from which step a resume goes on, and what training without a cache ends with."""
    found = []
    for kind, damage in DAMAGES.items():
        url, remote = url_of(folder / kind), folder / kind
        shutil.copytree(run, remote)
        (remote / "result.json").unlink()
        newest = committed(remote / "checkpoints")[-1]
        damage(newest)
        os.environ[CACHE] = str(folder / f"cache_{kind}")
        path, at_url = located(url)
        recipe = read_recipe(path, at_url)
        fitted = read_fitted(path, recipe, ranks, at_url)
        said = fails(lambda: load_run(path, recipe, fitted, ranks, at_url))  # noqa: B023
        again = trainer(ranks, log, url, folder / f"cache_{kind}", resume=True)
        begin = again.step
        assert sorted(path.name for path in (remote / "checkpoints").glob("*" + DAMAGED)) == [newest.name + DAMAGED]
        again.fit()
        found.append((said, begin, str(step_of(newest))))
        assert_equal_runs(remote, run)
    return found


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": lambda step: flip(step / "rank_0.0.safetensors"),
    "missing": lambda step: (step / "rank_0.0.safetensors").unlink(),
    "short": lambda step: os.truncate(step / "rank_0.0.safetensors", 1000),
    "manifest": lambda step: flip(step / MANIFEST),
}


def test_damage_at_the_url_is_named_and_the_checkpoint_before_it_is_taken(log: Path, undisturbed: Path, tmp_path: Path) -> None:
    steps = [step_of(path) for path in committed(undisturbed / "checkpoints")]
    for kind, (said, begin, newest) in zip(DAMAGES, run_on_ranks(1, resume_damaged, log, tmp_path, undisturbed)[0], strict=True):
        file = MANIFEST if kind == "manifest" else "rank_0.0.safetensors"
        assert said.startswith(f"{url_of(tmp_path / kind)}/checkpoints/step_{newest}/{file}: {'missing' if kind == 'missing' else ''}"), (
            said
        )
        assert begin == steps[-2]


class Interrupted(Trainer):
    """After its fourth step, `meanwhile` happens, once."""

    meanwhile: Callable[[], None]

    def _look_at(self, report: Any) -> None:
        super()._look_at(report)
        if self.step == 4:
            self.saver.wait()
            type(self).meanwhile()


def two_trainings(ranks: Ranks, log: Path, folder: Path) -> dict[str, Any]:
    """One begins where the other trains; the same on one machine; a fresh run where there is one."""
    url, said = url_of(folder / "url"), dict[str, Any]()

    def second() -> None:
        said["same machine"] = fails(lambda: trainer(ranks, log, url, folder / "a", resume=True))
        said["second"] = trainer(ranks, log, url, folder / "b", resume=True)
        said["random"] = torch.get_rng_state()  # which both draw from, as they are in one process

    Interrupted.meanwhile = second
    first = trainer(ranks, log, url, folder / "a", resume=False, kind=Interrupted)
    said["first"] = fails(first.fit)
    torch.set_rng_state(said["random"])
    said["second"].fit()
    said["state"] = state_of(said.pop("second"))
    said["without resume"] = fails(lambda: trainer(ranks, log, url, folder / "c", resume=False))
    return said


def test_two_trainings_in_one_run(log: Path, undisturbed: Path, tmp_path: Path) -> None:
    said = run_on_ranks(1, two_trainings, log, tmp_path)[0]
    url = url_of(tmp_path / "url")
    assert "another process trains in this folder" in said["same machine"]
    assert (
        said["first"].startswith(f"{url}: another process trains in this run (first rank: pid ") and socket.gethostname() in said["first"]
    )
    assert said["without resume"].startswith(f"{url} already holds a trained run; add --resume")
    assert_equal_runs(tmp_path / "url", undisturbed)


def someone_commits(ranks: Ranks, log: Path, folder: Path) -> str:
    """A training that looked before this one began, and commits after it."""

    def meanwhile() -> None:
        shutil.copytree(folder / "url/checkpoints/step_2", folder / "url/checkpoints/step_5")

    Interrupted.meanwhile = meanwhile
    return fails(trainer(ranks, log, url_of(folder / "url"), folder / "a", resume=False, kind=Interrupted).fit)


def test_a_commit_of_another_training_is_seen(log: Path, tmp_path: Path) -> None:
    assert "another process trains in this run (it committed" in run_on_ranks(1, someone_commits, log, tmp_path)[0]


def storage_vanishes(ranks: Ranks, log: Path, folder: Path, background: bool) -> tuple[str, str, dict[str, Any]]:
    remote, away = folder / "url", folder / "away"

    def vanish() -> None:
        remote.rename(away)
        remote.write_text("not a folder")

    Interrupted.meanwhile = vanish
    first = trainer(ranks, log, url_of(remote), folder / "a", resume=False, kind=Interrupted, checkpoint__background=background)
    said = fails(first.fit)
    first.lock.close()
    at_start = fails(lambda: trainer(ranks, log, url_of(remote), folder / "b", resume=True))
    remote.unlink()
    away.rename(remote)
    again = trainer(ranks, log, url_of(remote), folder / "a", resume=True, checkpoint__background=background)
    assert again.step >= 2
    again.fit()
    return said, at_start, state_of(again)


@pytest.mark.parametrize("background", [False, True])
def test_storage_that_vanishes_is_named_and_the_run_goes_on(log: Path, undisturbed: Path, tmp_path: Path, background: bool) -> None:
    said, at_start, _ = run_on_ranks(1, storage_vanishes, log, tmp_path, background)[0]
    assert url_of(tmp_path / "url") in said and said.endswith("is whole; mend this and go on with --resume"), said
    assert url_of(tmp_path / "url") in at_start, at_start
    assert_equal_runs(tmp_path / "url", undisturbed)
