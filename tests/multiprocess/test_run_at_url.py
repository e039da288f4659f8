"""A run at a URL equals a run in a folder, whatever it is interrupted by; what the URL has counts, and only one training writes there."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.campaign import assert_equal_runs
from tests.ranks import run_on_ranks
from tests.runs import local_values
from tests.small import write_log
from triptych.datasets.schema import InputError
from triptych.launch.build import model_state, optimizer_state
from triptych.launch.checkpoints.manifest import DAMAGED, MANIFEST, committed, step_of
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.nodes.mirror import CACHE, Mirror, located
from triptych.launch.nodes.remote import WRITING, RemoteFolder
from triptych.launch.run_folder import load_run, read_fitted, read_recipe
from triptych.launch.trainer import Trainer

SETTINGS = [
    "checkpoint.every_steps=2", "checkpoint.keep=2", "checkpoint.keep_best=1", "train.evaluate_every=3", "train.epochs=2",
    "data.batch_size=128", "model.dropout=0.2", "features.length.transform=standard", "tables.item.ids=vocabulary",
    "tables.user.ids=dynamic",
]  # fmt: skip
WRITES = ("put", "write", "move", "delete", "delete_folder")
"""What changes a URL."""


def url_of(folder: Path) -> str:
    """A URL that several processes see, of another file system than local folders have."""
    return f"local://{folder}"


def trainer(ranks: Ranks, log: Path, run: str, cache: Path, *, resume: bool, kind: type[Trainer] = Trainer, **overrides: Any) -> Trainer:
    os.environ[CACHE] = str(cache)
    folder, at_url = located(run)
    values = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    recipe = load_recipe(log, [*SETTINGS, *values])
    return kind(recipe, folder, ranks, resume=resume, mirror=Mirror(at_url, ranks) if at_url is not None else None)


def state_of(trained: Trainer) -> dict[str, Any]:
    return local_values(model_state(trained.built) | optimizer_state(trained.built))


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found[name], parts, strict=True)), name


def assert_same_checkpoints(remote: Path, local: Path) -> None:
    """The same ones, of the same files, and nothing besides."""
    names = [[path.name for path in committed(run / "checkpoints")] for run in (remote, local)]
    assert names[0] == names[1] == sorted(os.listdir(remote / "checkpoints"), key=lambda name: int(name[5:]))
    for name in names[0]:
        files = [sorted(os.listdir(run / "checkpoints" / name)) for run in (remote, local)]
        assert files[0] == files[1]
        for file in files[0]:
            if file != MANIFEST:
                assert (remote / "checkpoints" / name / file).read_bytes() == (local / "checkpoints" / name / file).read_bytes()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def undisturbed(log: Path) -> Path:
    """A run in a folder, of one rank."""
    run_on_ranks(1, train_there, log, str(log.parent / "undisturbed"), log.parent / "none")
    return log.parent / "undisturbed"


def train_there(ranks: Ranks, log: Path, run: str, cache: Path, batch_size: int = 128) -> dict[str, Any]:
    trained = trainer(ranks, log, run, cache, resume=False, data__batch_size=batch_size)
    assert trained.fit()
    return state_of(trained)


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


def start_elsewhere(ranks: Ranks, log: Path, folder: Path, run: Path) -> list[dict[str, Any]]:
    """New runs that start from a run, and from a checkpoint of it: from its folder, and from its URL."""
    found = []
    newest = committed(run / "checkpoints")[-1].name
    for number, start in enumerate((str(run), url_of(run), f"{run}/checkpoints/{newest}", f"{url_of(run)}/checkpoints/{newest}")):
        begun = trainer(ranks, log, str(folder / f"run_{number}"), folder / "cache", resume=False, checkpoint__start_from=start)
        found.append(local_values(model_state(begun.built)) | {"listing": json.loads((begun.run / "start_from.json").read_text())})
    return found


def test_a_run_starts_from_a_url(log: Path, undisturbed: Path, tmp_path: Path) -> None:
    results = run_on_ranks(1, start_elsewhere, log, tmp_path, undisturbed)[0]
    for from_folder, from_url in (results[:2], results[2:]):
        listings = from_folder.pop("listing"), from_url.pop("listing")
        assert listings[1].pop("checkpoint") == url_of(Path(listings[0].pop("checkpoint"))) and listings[0] == listings[1]
        assert_equal_states(from_url, from_folder)
