"""Runs that start from other runs: what changes in their recipes, and what their ranks do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch

from tests.ranks import run_on_ranks
from tests.runs import local_values
from triptych.embeddings.sharding import of_table
from triptych.launch.build import model_state, optimizer_state
from triptych.launch.checkpoints.parts import local_parts
from triptych.launch.checkpoints.start_from import LISTING
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.inference import predict_rows
from triptych.launch.trainer import Trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Edit = Callable[[dict[str, Any]], None]
State = dict[str, torch.Tensor]
TASKS = ["ctr", "cvr", "dwell"]
BASES = {
    "ple": [],
    "cgc": ["model.sharing=cgc", "tables.item.rows=80"],
    "mmoe": ["model.sharing=mmoe"],
    "shared_bottom": ["model.sharing=shared_bottom"],
    "vocabulary": ["tables.user.ids=vocabulary", "tables.user.rows=120", "features.length.transform=standard"],
    "dynamic": ["tables.user.ids=dynamic", "tables.user.rows=193", "tables.words.ids=dynamic", "tables.words.min_count=2"],
    "attention": ["features.seen.pooling=attention", "features.seen.positions=true", "tables.item.dtype=fp16"],
}
"""Runs to start from, of one rank."""


def named(parts: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(part for part in parts if part["name"] == name)


def table(name: str, **changes: Any) -> Edit:
    return lambda values: named(values["tables"], name).update(changes)


def feature(name: str, **changes: Any) -> Edit:
    return lambda values: named(values["features"], name).update(changes)


def in_turn(*edits: Edit) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        for part in edits:
            part(values)

    return edit


def without(kind: str, *names: str) -> Edit:
    """Without these features or tasks, and the tables that none uses then."""

    def edit(values: dict[str, Any]) -> None:
        values[kind] = [part for part in values[kind] if part["name"] not in names]
        used = {part.get("table") for part in values["features"]}
        values["tables"] = [part for part in values["tables"] if part["name"] in used]

    return edit


NEW_FEATURES: dict[str, dict[str, Any]] = {
    "when": {"name": "when", "column": "time_ms", "kind": "dense", "transform": "standard", "side": "user"},
    "again": {"name": "again", "column": "queries", "kind": "ids", "table": "more", "side": "item", "pooling": "sum"},
    "looked": {"name": "looked", "column": "seen", "kind": "ids", "table": "item", "side": "user", "pooling": "attention"},
    "where": {"name": "where", "column": "page", "kind": "id", "table": "more", "side": "context"},
}
WIDTHS = {"when": 1, "again": 12, "looked": 16, "where": 12}
PLACES = {"front": {"when": 0, "looked": 0}, "middle": {"again": 2, "when": 5}, "end": {"where": 99, "looked": 99, "when": 99}}
"""Where features are added."""


def with_features(places: Mapping[str, int]) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        for name, place in places.items():
            values["features"].insert(place, NEW_FEATURES[name])
        if any(part.get("table") == "more" for part in values["features"]):
            values["tables"].insert(1, {"name": "more", "rows": 40, "dim": 12})

    return edit


def add_task(values: dict[str, Any]) -> None:
    values["tasks"].insert(1, {"name": "long", "kind": "duration", "label": "dwell_ms", "scale": 0.001, "cap": 60})


def reorder(values: dict[str, Any]) -> None:
    for kind in ("tables", "features"):
        values[kind].reverse()
    values["tasks"] = [values["tasks"][i] for i in (1, 2, 0)]


def make_duration_of_cvr(values: dict[str, Any]) -> None:
    task = named(values["tasks"], "cvr")
    task.clear()
    task.update({"name": "cvr", "kind": "duration", "label": "dwell_ms"})


def strangers(values: dict[str, Any]) -> None:
    for kind in ("features", "tasks"):
        for part in values[kind]:
            part["name"] = f"other_{part['name']}"
            for key in ("given", "table"):
                if key in part:
                    part[key] = f"other_{part[key]}"
    for part in values["tables"]:
        part["name"] = f"other_{part['name']}"
    values.pop("retrieval")


def start_at(path: Path) -> Edit:
    return lambda values: values["checkpoint"].update(start_from=str(path))


def with_plan(sharding: str) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        values["train"]["embedding_optimizer"] = "adagrad"  # which goes with every plan
        for part in values["tables"]:
            part["sharding"] = sharding

    return edit


def new_values(sharding: str) -> Edit:
    """Other training files, and so another vocabulary and other statistics."""
    return in_turn(with_plan(sharding), table("user", rows=150), lambda values: values["data"].update(train="valid.parquet"))


SIZES = {"same": (193, 3, 64), "grown": (700, 10, 69), "smaller": (129, 2, 64), "tiny": (30, 1, 29)}
"""Rows of dynamic tables, and the sets and ways that they make."""


def dynamic_sizes(sharding: str) -> dict[str, tuple[str, Edit]]:
    plan = [table("user", sharding=sharding)]
    return {
        f"dynamic_{size}_{sharding}": ("dynamic", in_turn(*plan, table("user", rows=rows), table("words", rows=rows)))
        for size, (rows, _, _) in SIZES.items()
    }


ONE_RANK: dict[str, tuple[str, Edit]] = {
    **{f"same_{base}": (base, in_turn()) for base in (*BASES, "keyed")},
    **{f"{place}_{base}": (base, with_features(at)) for place, at in PLACES.items() for base in ("ple", "mmoe", "dynamic")},
    **{f"task_{base}": (base, add_task) for base in ("ple", "cgc", "mmoe", "shared_bottom")},
    "fewer_features": ("ple", without("features", "queries", "page", "length")),
    "fewer_tasks": ("mmoe", without("tasks", "cvr")),
    "reordered": ("ple", reorder),
    "other_kind": ("mmoe", make_duration_of_cvr),
    "other_shapes": ("ple", in_turn(table("words", dim=8), lambda values: values["model"].update(tower_layers=[12]))),
    "other_sharing": ("ple", lambda values: values["model"].update(sharing="mmoe")),
    "no_retrieval": ("ple", lambda values: values.pop("retrieval")),
    "other_meaning": ("ple", feature("length", transform="none", scale=0.01)),
    "more_experts": ("mmoe", lambda values: values["model"].update(experts=5)),
    "index_grown": ("ple", table("item", rows=80)),
    "index_shrunk": ("cgc", table("item", rows=60)),
    "hash_rows": ("ple", table("user", rows=98)),
    "other_ids": ("ple", table("user", ids="dynamic")),
    "halved": ("ple", table("item", dtype="fp16")),
    "keyless": ("keyed", lambda values: named(values["tables"], "user").pop("key_file")),
    "vocabulary_data_parallel": ("vocabulary", new_values("data_parallel")),
    **dynamic_sizes("data_parallel"),
    "to_sequence": ("ple", feature("seen", pooling="attention")),
    "to_bags": ("attention", feature("seen", pooling="mean", positions=False)),
}
TWO_RANKS: dict[str, tuple[str, Edit]] = {
    **{f"{plan}_{base}": (base, with_plan(plan)) for plan in ("row_wise", "column_wise") for base in ("ple", "attention")},
    **{f"vocabulary_{plan}": ("vocabulary", new_values(plan)) for plan in ("row_wise", "column_wise")},
    **dynamic_sizes("row_wise"),
    **dynamic_sizes("table_wise"),
}
"""Names of new runs: what they start from, and what changes in its recipe."""


def train_bases(ranks: Ranks, log: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, overrides in {**BASES, "keyed": [f"tables.user.key_file={log.parent / 'key'}"]}.items():
        everywhere = [f"tables.{part}.sharding=data_parallel" for part in ("user", "words")]
        trainer = Trainer(load_recipe(log, [*overrides, *everywhere]), log.parent / "runs" / name, ranks, resume=False)
        trainer.fit()
        found[name] = answers(trainer, ranks)
    return found


def answers(trainer: Trainer, ranks: Ranks) -> dict[str, Any]:
    """The predictions of each task on `valid`, and this rank's parts of the model."""
    assert trainer.valid is not None
    predictions = predict_rows(trainer.built, trainer.valid.loader, ranks)
    columns = predictions.prediction_NT.T if predictions is not None else [None] * len(trainer.recipe.tasks)
    by_task = {task.name: column for task, column in zip(trainer.recipe.tasks, columns, strict=True)}
    return {"predictions": by_task, "parts": local_values(model_state(trainer.built))}


def start_all(ranks: Ranks, log: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Begin runs, and train none of their steps: their answers, and what they list as not loaded."""
    found = {}
    for name in names:
        run = log.parent / "runs" / name
        trainer = Trainer(load_recipe(log.parent / f"{name}.toml"), run, ranks, resume=False)
        assert trainer.step == 0
        assert not any(part.tensor.any() for value in optimizer_state(trainer.built).values() for part in local_parts(value))
        found[name] = answers(trainer, ranks) | {"listing": json.loads((run / LISTING).read_text()) if ranks.is_first else None}
    return found


def write_recipe(log: Path, name: str, base: str, edit: Edit) -> Path:
    values = tomllib.loads((log.parent / "runs" / base / "recipe.toml").read_text())
    values["checkpoint"]["start_from"] = str(log.parent / "runs" / base)
    values["train"]["seed"] += 1  # nothing is alike by chance
    edit(values)
    path = log.parent / f"{name}.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def started(log: Path, edits: dict[str, tuple[str, Edit]], world_size: int) -> dict[str, dict[str, Any]]:
    for name, (base, edit) in edits.items():
        write_recipe(log, name, base, edit)
    results = run_on_ranks(world_size, start_all, log, list(edits))
    return {name: result | {"state": whole([r[name]["parts"] for r in results])} for name, result in results[0].items()}


def whole(parts: Sequence[dict[str, Any]]) -> State:
    """All ranks' parts joined."""
    found: State = {}
    for name in {name for of_rank in parts for name in of_rank}:
        pieces = [piece for of_rank in parts for piece in of_rank.get(name, [])]
        ends = torch.tensor([[o + s for o, s in zip(offsets, tensor.shape, strict=True)] for offsets, tensor in pieces])
        found[name] = torch.zeros(ends.amax(0).tolist() if ends.numel() else [], dtype=pieces[0][1].dtype)
        for offsets, tensor in pieces:
            found[name][tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))] = tensor
    return found


def table_of(state: State, name: str) -> torch.Tensor:
    return next(value for key, value in state.items() if key.startswith("model/") and of_table(key) == name)
