"""Dense weights of another run's checkpoint -> this model's: by the names of features, tasks and experts, not by position."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from ...datasets.schema import InputError
from ...embeddings.sharding import of_table
from ...mmoe.axes import Axes, carry, origins, units, width
from ...mmoe.gates import Gates
from ...mmoe.model import task_block
from ..build import Built, table_state, train_task
from ..config import Recipe
from .reader import Reader

_HEAD = re.compile(r"(?<=^objective\.heads\.)\d+(?=\.)")


class DenseTensor(NamedTuple):
    """A dense weight, or a buffer of a task's head, as checkpoints have it."""

    name: str
    axes: Axes


class CarriedDense(NamedTuple):
    """Names of dense tensors that were loaded whole and in part, the number of all, and why others were not."""

    whole: list[str]
    partly: list[str]
    total: int
    remarks: list[str]


def dense_tensors(recipe: Recipe) -> dict[str, DenseTensor]:
    """All of a recipe's, by names in which tasks have no numbers. Draws no random numbers."""
    with torch.random.fork_rng():
        task = train_task(recipe)
    axes, heads = task.model.axes(), [task_block(label).name for label in recipe.tasks]
    return {
        _HEAD.sub(lambda number: heads[int(number[0])], name): DenseTensor(
            f"model/{name}", axes.get(name.removeprefix("model."), tuple(map(units, value.shape)))
        )
        for name, value in task.state_dict().items()
        if of_table(name) is None
    }


def carry_dense(built: Built, reader: Reader, then: Recipe, now: Recipe) -> CarriedDense:
    """Load what stands for the same.

    Raises:
        InputError: the checkpoint is not of the recipe `then`.
    """
    theirs, ours, state = dense_tensors(then), dense_tensors(now), table_state(built)
    found = CarriedDense([], [], len(ours), recipe_remarks(then, now))
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, (name, axes) in ours.items():
        module, _, weight = key.rpartition(".")
        if key not in theirs and _HEAD.search(name.removeprefix("model/")):
            continue  # its task is new, which is said
        if key not in theirs:
            reasons.setdefault((module, "not in the checkpoint"), []).append(weight)
            continue
        their_name, their_axes = theirs[key]
        sizes = [[width(axis) for axis in a] for a in (their_axes, axes)]
        if reader.manifest["tensors"].get(their_name, {}).get("shape") != sizes[0]:
            raise InputError(f"{reader.folder}: '{their_name}' is not as the run's recipe.toml has it; restore that file")
        how_much = carry(state[name], axes, reader.read(their_name).to(built.device), their_axes)
        if how_much == "none":
            reasons.setdefault((module, f"shape {sizes[0]} then, {sizes[1]} now"), []).append(weight)
        else:
            (found.whole if how_much == "all" else found.partly).append(key)
    _start_new_experts(built, theirs, ours)
    found.remarks.extend(f"{module}: {', '.join(weights)}: not loaded, {reason}" for (module, reason), weights in reasons.items())
    return found


def _start_new_experts(built: Built, theirs: Mapping[str, DenseTensor], ours: Mapping[str, DenseTensor]) -> None:
    for name, module in built.task.named_modules():
        bias = f"{name}.linear.bias_GO"
        if isinstance(module, Gates) and bias in theirs:
            known = [origins(*axes) >= 0 for axes in zip(ours[bias].axes, theirs[bias].axes, strict=True)]
            module.start_new_experts(*(known_N.to(built.device) for known_N in known))


def recipe_remarks(then: Recipe, now: Recipe) -> list[str]:
    """What features, tasks and sections are new, gone or changed, and what that does to their weights."""
    return [
        *_of_parts(
            "feature",
            {f.name: (f, _feature_width(then, f.name)) for f in then.features},
            {f.name: (f, _feature_width(now, f.name)) for f in now.features},
            "its weights start at 0",
        ),
        *_of_parts(
            "task",
            {t.name: (t, t.kind) for t in then.tasks},
            {t.name: (t, t.kind) for t in now.tasks},
            "its weights start as in a new run",
        ),
        *_of_section("model", then.model, now.model),
        *_of_section("retrieval", then.retrieval, now.retrieval),
    ]


def _feature_width(recipe: Recipe, name: str) -> str:
    feature = recipe.data_schema.feature(name)
    dims = {table.name: table.dim for table in recipe.tables}
    return f"{dims[feature.table] if feature.table else feature.width} wide"


def _of_parts(what: str, then: Mapping[str, tuple[BaseModel, str]], now: Mapping[str, tuple[BaseModel, str]], start: str) -> list[str]:
    """Of named parts, each with what must not change if its weights are to be loaded."""
    remarks = [f"{what} {name}: new; {start}" for name in now if name not in then]
    remarks += [f"{what} {name}: no longer there" for name in then if name not in now]
    for name in (name for name in now if name in then):
        (part_then, must_then), (part_now, must_now) = then[name], now[name]
        if must_then != must_now:
            remarks.append(f"{what} {name}: {must_then} then, {must_now} now; {start}")
        elif changes := _changes(part_then, part_now):
            remarks.append(f"{what} {name}: loaded, but changed: {changes}")
    return remarks


def _of_section(what: str, then: BaseModel | None, now: BaseModel | None) -> list[str]:
    if then is None or now is None:
        return [] if then is now else [f"[{what}]: {'new' if then is None else 'no longer there'}"]
    changes = _changes(then, now)
    return [f"[{what}]: {changes}"] if changes else []


def _changes(then: BaseModel, now: BaseModel) -> str:
    """The keys in which two parts of recipes differ, and their values."""
    values: tuple[dict[str, Any], dict[str, Any]] = (then.model_dump(mode="json"), now.model_dump(mode="json"))
    return ", ".join(f"{key} = {values[0][key]} then, {value} now" for key, value in values[1].items() if value != values[0][key])
