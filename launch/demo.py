"""The whole line once, on a world whose truth is known: synth, train, evaluate, export, search, and how near the model came."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from ..datasets.parquet.listing import list_slices
from ..datasets.schema import InputError
from ..embeddings.vectors import read_all
from . import cli
from .config import load_recipe
from .inference import Predictions, evaluate_rows

TRUTH = {"ctr": "true_ctr", "cvr": "true_cvr", "dwell": "true_dwell"}
"""Columns of the synthetic world that hold the true expectation of each task's label."""
MEASURE = {"binary": ("auc", 0.5), "duration": ("xauc", 0.5)}
"""Metric of a kind of task, and what chance reaches."""


def truth_metrics(recipe_path: Path, data: Path) -> dict[str, Any]:
    """The metrics that the world's true probabilities reach on the rows of `data`."""
    recipe = load_recipe(recipe_path)
    truth = pq.read_table(data, columns=list(TRUTH.values()))
    truth_NT = np.stack([truth.column(TRUTH[task.name]).to_numpy() for task in recipe.tasks], axis=1)
    slices = list_slices(recipe.data_schema, [str(data)], labels=True).slices
    return evaluate_rows(Predictions(truth_NT, np.ones(len(truth_NT), bool)), slices, recipe.data_schema, recipe.tasks)["tasks"]


def comparison(found: dict[str, Any], truth: dict[str, Any]) -> Table:
    """Per task: the metric, what the truth reaches, and the share of the way from chance to there."""
    table = Table("task", "metric", "chance", "model", "truth", "share of the way", title="The model against the world's truth, on test")
    for name, metrics in found.items():
        metric, chance = MEASURE[metrics["kind"]]
        given = f" given {metrics['given']}" if "given" in metrics else ""
        reached, best = metrics[metric], truth[name][metric]
        share = (reached - chance) / (best - chance)
        table.add_row(name + given, metric, f"{chance:.3f}", f"{reached:.4f}", f"{best:.4f}", f"{share:.1%}")
    return table


def demo(folder: Path, rows: int, ranks: int) -> None:
    """Run every step and print its command, so that each can be repeated by hand."""
    if ":/" in str(folder):
        raise InputError(f"--run {folder}: the demo makes its world, run and vectors in a folder of this machine; give one")
    world, run, vectors = folder / "world", folder / "run", folder / "vectors"
    for ours in (world, run, vectors):
        shutil.rmtree(ours, ignore_errors=True)
    began = time.monotonic()

    def step(command: str, work: Callable[[], None]) -> None:
        print(f"\n$ triptych {command}", flush=True)
        work()
        print(f"# after {time.monotonic() - began:.0f} s", flush=True)

    override = f"data.root={world}"
    step(f"synth --out {world} --rows {rows}", lambda: cli.synth(world, rows))
    step(
        f"train --recipe demo --set {override} --run {run} --ranks {ranks}",
        lambda: cli.train("demo", str(run), ranks, [override]),
    )
    step(
        f"evaluate --run {run} --data test.parquet --json {folder / 'test.json'}",
        lambda: cli.evaluate(str(run), "test.parquet", str(folder / "test.json")),
    )
    step(f"export --run {run} --out {vectors}", lambda: cli.export(str(run), str(vectors)))
    user = str(read_all(vectors / "users", "user_id")[0][0].as_py())
    step(f"search --index {vectors} --user {user} -k 10", lambda: cli.search(vectors, user))
    found = json.loads((folder / "test.json").read_text(encoding="utf-8"))["tasks"]
    print()
    Console().print(comparison(found, truth_metrics(run / "recipe.toml", world / "test.parquet")))
