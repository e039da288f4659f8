"""A new run starts from another run's checkpoint: what stands for the same is loaded, what does not is listed.

Weights match by what they stand for: tables, features, tasks and experts by name. Where only features, tables, tasks or rows are
added, the new model predicts at first what the old one did: a new feature's weights are 0, and trained gates begin with next to
nothing of new experts. Optimizer states, reading, evaluations and random states begin anew, and so do fitted statistics, which
are those of the new run's files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ...datasets.fitted import Fitted
from ...datasets.schema import InputError
from ..build import Built
from ..config import Recipe, difference, load_recipe, meaning
from ..console import say
from ..distributed import Ranks
from ..nodes.mirror import Mirror, RunAtUrl
from ..nodes.remote import is_remote, local_path
from ..run_folder import check_fitted, chosen_checkpoint, read_recipe
from ..writing import write_json
from .carried_dense import CarriedDense, carry_dense
from .carried_tables import CarriedTables, Described, carry_tables
from .manifest import MANIFEST, read_manifest, step_of
from .reader import Reader

LISTING = "start_from.json"


def checkpoint_to_start_from(recipe: Recipe) -> Path | None:
    """The checkpoint that `checkpoint.start_from` names: of a run, the best if it is finished, or else the newest.

    Raises:
        InputError: there is none, or its manifest or the run's recipe cannot be read.
    """
    if recipe.checkpoint.start_from is None:
        return None
    if is_remote(recipe.checkpoint.start_from):
        folder = _checkpoint_at_url(*_run_and_step(recipe.checkpoint.start_from))
        _recipe_of(folder)
        return folder
    folder = given = local_path(recipe.checkpoint.start_from)
    if (given / "recipe.toml").is_file():
        read_recipe(given)
        folder = chosen_checkpoint(given)
    elif not (given / MANIFEST).is_file() or not re.fullmatch(r"step_\d+", given.name):
        raise InputError(f"checkpoint.start_from = '{given}': no checkpoint there; give a run folder, or one of its checkpoints/step_N")
    _recipe_of(folder)
    return folder


def _run_and_step(url: str) -> tuple[RunAtUrl, int | None]:
    """The run of a URL, and the step if it names one of its checkpoints."""
    place, mark, query = url.partition("?")
    named = re.fullmatch(r"(.+)/checkpoints/step_(\d+)/?", place)
    return (RunAtUrl(named[1] + mark + query), int(named[2])) if named else (RunAtUrl(url), None)


def _checkpoint_at_url(run: RunAtUrl, step: int | None) -> Path:
    """The folder of this node that stands for a checkpoint, with its manifest, and its run's recipe and statistics beside it.

    Raises:
        InputError: there is none, or the URL cannot be read.
    """
    steps = run.steps()
    if not steps or (step is not None and step not in steps):
        raise InputError(f"checkpoint.start_from = '{run}': no checkpoint there; give a run, or one of its checkpoints/step_N")
    run.fetch("recipe.toml")
    run.fetch_fitted()
    return run.fetch_manifest(run.chosen_step(steps) if step is None else step)


def _recipe_of(folder: Path) -> Recipe:
    """The recipe that a checkpoint was trained with.

    Raises:
        InputError: it is not there, or another one.
    """
    path = folder.parents[1] / "recipe.toml"
    if not path.is_file():
        raise InputError(f"{path}: not there; to start from {folder.name}, the recipe and fitted/ of its run are needed too")
    recipe = load_recipe(path)
    differs = difference(read_manifest(folder)["meaning"], meaning(recipe))
    if differs is not None:
        raise InputError(f"{path} is not what {folder.name} was trained with ('{differs[0]}' differs); restore it")
    return recipe


def start_from(built: Built, recipe: Recipe, fitted: Fitted, ranks: Ranks, run: Path) -> None:
    """Fill a model that was just initialised from the checkpoint that its recipe names, say what was not loaded, and leave it in
    RUN/start_from.json. Collective.

    Raises:
        InputError: the checkpoint is not there or damaged, or has nothing in common with the recipe.
    """
    folder = ranks.from_first(lambda: checkpoint_to_start_from(recipe))
    assert folder is not None and recipe.checkpoint.start_from is not None
    where = str(folder)
    if is_remote(recipe.checkpoint.start_from):  # each node has a folder of its own for it
        at_url = _run_and_step(recipe.checkpoint.start_from)[0]
        folder = Mirror(at_url, ranks).fetch(step_of(folder))
        where = at_url.url_of(folder)
    reader, now = Reader(folder), Described(recipe, fitted)
    then = ranks.from_first(lambda: _described(reader.folder, reader.manifest))
    if not _have_common_names(then.recipe, recipe):
        raise InputError(f"{where}: has no table, feature or task of this recipe; nothing of it can be loaded")
    tables = carry_tables(built, reader, then, now, ranks)
    dense = carry_dense(built, reader, then.recipe, recipe)
    if ranks.is_first:
        remarks = [*tables.remarks, *dense.remarks, *statistics_remarks(then.fitted, fitted)]
        _say(where, tables, dense, remarks)
        write_json(run / LISTING, _listing(where, reader.manifest["step"], tables, dense, remarks))


def _described(folder: Path, facts: dict[str, Any]) -> Described:
    recipe = _recipe_of(folder)
    fitted = Fitted.load(folder.parents[1], recipe.data_schema)
    check_fitted(fitted, folder, facts)
    return Described(recipe, fitted)


def _have_common_names(then: Recipe, now: Recipe) -> bool:
    parts = ((then.tables, now.tables), (then.features, now.features), (then.tasks, now.tasks))
    return any({part.name for part in a} & {part.name for part in b} for a, b in parts)


def statistics_remarks(then: Fitted, now: Fitted) -> list[str]:
    """Features whose numbers are scaled otherwise, as the new files have another mean, deviation or distribution."""
    remarks = []
    for name, moments in now.moments.items():
        old = then.moments.get(name)
        if old is not None and not (_equal(old.mean_D, moments.mean_D) and _equal(old.deviation_D, moments.deviation_D)):
            changes = ", ".join(
                f"{what} {_numbers(a)} then, {_numbers(b)} now"
                for what, a, b in (("mean", old.mean_D, moments.mean_D), ("deviation", old.deviation_D, moments.deviation_D))
            )
            remarks.append(f"feature {name}: loaded, but scaled otherwise: {changes}")
    for name, quantiles in now.quantiles.items():
        before = then.quantiles.get(name)
        if before is not None and not all(map(_equal, before.values_D + before.shares_D, quantiles.values_D + quantiles.shares_D)):
            remarks.append(f"feature {name}: loaded, but its quantiles are others now")
    return remarks


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b)


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in np.atleast_1d(values))


def _say(where: str, tables: CarriedTables, dense: CarriedDense, remarks: list[str]) -> None:
    partly = f", {len(dense.partly)} more in part" if dense.partly else ""
    counts = f"{len(tables.loaded)} of {tables.total} tables, {len(dense.whole)} of {dense.total} dense tensors{partly}"
    say(f"started from {where}: loaded {counts}")
    for remark in remarks:
        say(f"  {remark}")


def _listing(where: str, step: int, tables: CarriedTables, dense: CarriedDense, remarks: list[str]) -> dict[str, Any]:
    return {
        "checkpoint": where,
        "step": step,
        "tables": {"loaded": tables.loaded, "of": tables.total},
        "dense": {"loaded": dense.whole, "partly": dense.partly, "of": dense.total},
        "remarks": remarks,
    }
