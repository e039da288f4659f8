"""SIGTERM at any step: the run saves, and what goes on from there equals the run that nobody stopped. Nothing is trained twice."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

from tests.faults.campaign import assert_equal_runs
from tests.ranks import run_on_ranks
from tests.small import write_log
from triptych.launch.config import Recipe, load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.trainer import Trainer

# 6 steps an epoch, evaluated in the middle of it and at its end; saved in between.
RECIPE = [
    "train.epochs=2", "train.evaluate_every=4", "train.log_every=1", "checkpoint.every_steps=3", "data.batch_size=30", "data.prefetch=1",
    "model.dropout=0.2", "tables.user.ids=dynamic", "tables.user.rows=65",
]  # fmt: skip
TRAIN_ROWS, STEPS = 350, 12


def fit(recipe: Recipe, run: Path, ranks: Ranks, *, resume: bool, asked_at: int | None = None) -> tuple[bool, int, int]:
    """Train; rank 1 gets SIGTERM once `asked_at` steps are trained. Returns whether it ended by itself, its first and its last step."""
    trainer = Trainer(recipe, run, ranks, resume=resume)
    first, train_step = trainer.step, trainer.pipeline.progress

    def progress(batches: Any) -> Any:
        if trainer.step == asked_at and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batches)

    trainer.pipeline.progress = progress  # type: ignore[method-assign]
    return trainer.fit(), first, trainer.step


def stop_everywhere(ranks: Ranks, recipe_path: Path, runs: Path) -> list[tuple[int, bool, int]]:
    """For each step at which the run was asked to stop: the step at which it did, whether it was done then, where it went on."""
    recipe = load_recipe(recipe_path, RECIPE)
    fit(recipe, runs / "undisturbed", ranks, resume=False)
    found = []
    for asked_at in range(STEPS):
        run = runs / str(asked_at)
        is_done, _, stopped_at = fit(recipe, run, ranks, resume=False, asked_at=asked_at)
        gc.collect()  # lets go of the folder
        goes_on_at = stopped_at
        if not is_done:
            ended, goes_on_at, last = fit(recipe, run, ranks, resume=True)
            assert ended and last == STEPS
            gc.collect()
        found.append((stopped_at, is_done, goes_on_at))
    return found


def test_a_run_that_is_stopped_at_any_step_ends_as_if_it_was_not(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", train_rows=TRAIN_ROWS, row_group_rows=60)
    found = run_on_ranks(2, stop_everywhere, log, tmp_path)
    assert found[0] == found[1]
    for asked_at, (stopped_at, is_done, goes_on_at) in enumerate(found[0]):
        # The step under way, the batches that are read and mapped ahead, and those in the pipeline.
        assert asked_at < stopped_at <= asked_at + 6, (asked_at, stopped_at)
        assert not is_done and goes_on_at == stopped_at  # after the last step, the last evaluation is left
        assert_equal_runs(tmp_path / str(asked_at), tmp_path / "undisturbed")
    stops = {stopped_at for stopped_at, _, _ in found[0]}
    assert {4, 6} <= stops, "none was stopped at an evaluation, or at the end of an epoch"
