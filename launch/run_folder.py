"""A run folder: what is in it, who may write to it, and which of its checkpoints to use.

recipe.toml  fitted/  plan.json  run.json  metrics.jsonl  tensorboard/  checkpoints/step_N/  result.json  logs/
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ..datasets.durable import sync
from ..datasets.fitted import Fitted
from ..datasets.schema import InputError
from .build import Built, build, load_model
from .checkpoints.manifest import chosen_step, committed, step_name, step_of
from .checkpoints.reader import Reader
from .config import Recipe, difference, load_recipe, meaning
from .distributed import Ranks
from .nodes.mirror import Mirror, RunAtUrl


def has_checkpoint(run: Path, at_url: RunAtUrl | None = None) -> bool:
    """Whether one was committed: at the URL, where the run is at one."""
    return bool(committed(run / "checkpoints") if at_url is None else at_url.steps())


def claim(run: Path, *, resume: bool, at_url: RunAtUrl | None = None) -> None:
    """Make a run folder, or go on in one.

    Raises:
        InputError: it holds checkpoints and `resume` was not asked for, or it cannot be made.
    """
    if not resume and has_checkpoint(run, at_url):
        raise InputError(f"{at_url or run} already holds a trained run; add --resume to go on with it, or choose another --run")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        sync(run)
        sync(run.absolute().parent)
    except OSError as error:
        raise InputError(f"{run}: cannot make the run folder ({error.strerror})") from error
    if not os.access(run, os.W_OK):
        raise InputError(f"{run}: the run folder is not writable")


def lock(run: Path) -> IO[str]:
    """Hold the folder against other trainings until the returned file is closed, at the latest by the end of this process.

    Raises:
        InputError: another process trains in it.
    """
    file = (run / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise InputError(
            f"{run}: another process trains in this folder ({holder}); wait for it, end it, or choose another --run"
        ) from error
    file.truncate(0)
    file.write(f"first rank: pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def shown(path: Path, mirror: Mirror | None) -> str:
    """What of a run the user knows: a path, or what it stands for at a URL."""
    return str(path) if mirror is None else mirror.run.url_of(path)


def enter(run: Path, ranks: Ranks, *, resume: bool, mirror: Mirror | None) -> tuple[IO[str] | None, bool]:
    """Claim a run folder to train in. Collective.

    Returns:
        What holds it against other trainings on the first rank, and whether there is a checkpoint to go on from.
    Raises:
        InputError: as `claim` and `lock`; or the URL of a run cannot be written.
    """
    held = None
    if ranks.is_first:
        claim(run, resume=resume, at_url=None if mirror is None else mirror.run)
        held = lock(run)
    goes_on = ranks.from_first(lambda: resume and has_checkpoint(run, None if mirror is None else mirror.run))
    if mirror is not None:
        mirror.begin(goes_on=goes_on)
    return held, goes_on


def read_recipe(run: Path, at_url: RunAtUrl | None = None) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        InputError: no run there, or one without a checkpoint.
    """
    name = at_url or run
    if at_url is not None:
        at_url.fetch("recipe.toml")
    if not (run / "recipe.toml").is_file():
        raise InputError(f"{name}: no run there (no recipe.toml); train one with: triptych train --run {name}")
    if not has_checkpoint(run, at_url):
        raise InputError(f"{name}: the run has no checkpoint yet")
    return load_recipe(run / "recipe.toml")


def read_fitted(run: Path, recipe: Recipe, ranks: Ranks, at_url: RunAtUrl | None = None) -> Fitted:
    """What a run fitted, on all ranks. Collective.

    Raises:
        InputError: it is not there or damaged, or a key is another one.
    """

    def read() -> Fitted:
        if at_url is not None:
            at_url.fetch_fitted()
        return Fitted.load(run, recipe.data_schema)

    return ranks.from_first(read)


def chosen_checkpoint(run: Path) -> Path:
    """As chosen_step has it."""
    result = b""
    with contextlib.suppress(OSError):  # the run goes on
        result = (run / "result.json").read_bytes()
    step = chosen_step([step_of(path) for path in committed(run / "checkpoints")], result)
    return run / "checkpoints" / step_name(step)


def files_of_run(run: Path) -> list[Path]:
    """What all nodes read of a run that is in a local folder."""
    folder = chosen_checkpoint(run)
    return [run / "recipe.toml", *sorted(path for path in folder.iterdir() if path.is_file())]


def check_fitted(fitted: Fitted, folder: Path, facts: Mapping[str, Any]) -> None:
    """A checkpoint is only good for the statistics, vocabularies and keys that it was trained with.

    Raises:
        InputError: they changed since.
    """
    if facts["fitted"] != fitted.digest():
        raise InputError(f"{folder.parents[1] / 'fitted'} is not what {folder.name} was trained with; restore it or start another run")


def check_same(recipe: Recipe, fitted: Fitted, folder: Path, facts: Mapping[str, Any]) -> None:
    """What a checkpoint's numbers mean is what the recipe says.

    Raises:
        InputError: they mean something else; names the key.
    """
    differs = difference(facts["meaning"], meaning(recipe))
    if differs is not None:
        key, then, now = differs
        raise InputError(
            f"{folder}: '{key}' differs from the recipe of this checkpoint ({then} then, {now} now); restore it or start another run"
        )
    check_fitted(fitted, folder, facts)


def to_predict(recipe: Recipe) -> Recipe:
    """The recipe of the same model without what only training needs: optimizer state, and a plan for as many ranks as trained."""
    free = {"sharding": "auto", "lr": None, "weight_decay": None}
    train = {"embedding_optimizer": "sgd", "embedding_weight_decay": 0.0, "comms": "fp32"}
    tables = tuple(table.model_copy(update=free) for table in recipe.tables)
    return recipe.model_copy(update={"tables": tables, "train": recipe.train.model_copy(update=train)})


def load_run(run: Path, recipe: Recipe, fitted: Fitted, ranks: Ranks, at_url: RunAtUrl | None = None) -> tuple[Built, int]:
    """Build the run's model on these ranks and fill it; returns it with the step of its checkpoint. Collective."""
    reader = Reader(chosen_checkpoint(run) if at_url is None else Mirror(at_url, ranks).fetch_chosen())
    check_fitted(fitted, reader.folder, reader.manifest)
    built = build(to_predict(recipe), ranks, initialise=False)
    load_model(built, reader)
    return built, int(reader.manifest["step"])
