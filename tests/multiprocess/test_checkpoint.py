"""Checkpoints: any plan reads any other's, a resumed run equals the undisturbed one bit for bit, and damage is never loaded."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_on_ranks
from tests.runs import local_values, stopped_copy
from tests.small import write_log
from triptych.datasets.fitted import Fitted
from triptych.datasets.schema import InputError
from triptych.launch.build import Built, build, load_model, load_optimizers, model_state, optimizer_state
from triptych.launch.checkpoints.manifest import MANIFEST, committed, prune, step_of
from triptych.launch.checkpoints.reader import Reader, open_newest
from triptych.launch.config import Recipe, load_recipe, save_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.inference import Split, predict_rows
from triptych.launch.run_folder import load_run
from triptych.launch.trainer import Trainer

PLANS = ["table_wise", "row_wise", "data_parallel", "mixed"]
MIXED = {"user": "row_wise", "item": "table_wise", "words": "data_parallel"}
FITTED = ["features.length.transform=standard", "tables.user.ids=vocabulary"]
DISTURBANCES = ["flipped", "cut", "missing", "other_step", "manifest"]


def recipe_with(path: Path, sharding: str, *more: str) -> Recipe:
    plan = [f"tables.{table}.sharding={kind if sharding == 'mixed' else sharding}" for table, kind in MIXED.items()]
    return load_recipe(path, [*plan, *more])


def valid_predictions(recipe: Recipe, built: Built, ranks: Ranks) -> np.ndarray | None:
    split = Split("valid", recipe.data_schema, recipe.tasks, "valid.parquet", ranks, Fitted())
    predictions = predict_rows(built, split.loader, ranks)
    return None if predictions is None else predictions.prediction_NT


def train_and_predict(ranks: Ranks, path: Path, runs: dict[str, Path]) -> dict[str, np.ndarray | None]:
    """Train a run with each plan; predictions of each."""
    predictions = {}
    for plan, run in runs.items():
        recipe = recipe_with(path, plan, "train.epochs=2")
        trainer = Trainer(recipe, run, ranks, resume=False)
        trainer.fit()
        predictions[plan] = valid_predictions(recipe, trainer.built, ranks)
    return predictions


def load_and_predict(ranks: Ranks, path: Path, runs: dict[str, Path]) -> dict[tuple[str, str], np.ndarray | None]:
    """Predictions of every run's checkpoint under every plan."""
    predictions = {}
    for plan in PLANS:
        recipe = recipe_with(path, plan)
        built = build(recipe, ranks)
        for saved_plan, run in runs.items():
            reader = Reader(committed(run / "checkpoints")[-1])
            load_model(built, reader)
            load_optimizers(built, reader)
            predictions[saved_plan, plan] = valid_predictions(recipe, built, ranks)
    return predictions


def train_few(ranks: Ranks, path: Path, run: Path, few: list[str]) -> np.ndarray | None:
    recipe = recipe_with(path, "table_wise", *few)
    trainer = Trainer(recipe, run, ranks, resume=False)
    trainer.fit()
    return valid_predictions(recipe, trainer.built, ranks)


def predict_elsewhere(ranks: Ranks, path: Path, run: Path, few: list[str]) -> np.ndarray | None:
    """As `predict` does, of a run whose optimizer and plan these ranks could not train with."""
    recipe = recipe_with(path, "table_wise", *few, "train.embedding_optimizer=adam", "train.embedding_weight_decay=0.1")
    built, _ = load_run(run, recipe, Fitted.load(run, recipe.data_schema), ranks)
    return valid_predictions(recipe, built, ranks)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


def test_any_plan_predicts_the_same(log: Path, tmp_path: Path) -> None:
    runs = {plan: tmp_path / plan for plan in ("row_wise", "data_parallel")}
    expected = run_on_ranks(2, train_and_predict, log, runs)[0]
    for world_size in (1, 2):
        found = run_on_ranks(world_size, load_and_predict, log, runs)[0]
        assert len(found) == len(PLANS) * len(runs)
        for (saved_plan, plan), predictions in found.items():
            message = f"saved {saved_plan} on 2 ranks, loaded {plan} on {world_size}"
            np.testing.assert_allclose(predictions, expected[saved_plan], rtol=1e-6, atol=0, err_msg=message)


def test_a_run_is_used_on_ranks_that_could_not_train_it(log: Path, tmp_path: Path) -> None:
    few = ["tables.words.rows=5", "tables.words.sharding=row_wise"]
    expected = run_on_ranks(1, train_few, log, tmp_path / "run", few)[0]
    for world_size in (1, 4):  # by rows, one of the four would have none
        found = run_on_ranks(world_size, predict_elsewhere, log, tmp_path / "run", few)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def fit(ranks: Ranks, path: Path, runs: list[tuple[str, Path]], resume: bool) -> list[dict[str, Any]]:
    """Train each (plan, run) with something fitted, dropout, evaluations inside epochs, often saved; this rank's final states."""
    results = []
    for plan, run in runs:
        more = ["train.epochs=3", "train.evaluate_every=5", "checkpoint.every_steps=3", "checkpoint.keep=1000", "model.dropout=0.2"]
        trainer = Trainer(recipe_with(path, plan, *FITTED, *more), run, ranks, resume=resume)
        trainer.fit()
        state = local_values(model_state(trainer.built) | optimizer_state(trainer.built))
        results.append({"state": state, "step": trainer.step, "position": trainer.position, "best": trainer.evaluations.state()})
    return results


def test_resumed_training_equals_undisturbed_training(log: Path, tmp_path: Path) -> None:
    wholes = [(plan, tmp_path / plan) for plan in ("row_wise", "data_parallel")]
    undisturbed = run_on_ranks(2, fit, log, wholes, False)
    stops = (3, 9)  # inside the first epoch, and inside the second
    stopped = [(plan, stopped_copy(whole, stop)) for plan, whole in wholes for stop in stops]
    resumed = run_on_ranks(2, fit, log, stopped, True)
    for expected_runs, found_runs in zip(undisturbed, resumed, strict=True):
        for i, found in enumerate(found_runs):
            expected = expected_runs[i // len(stops)]
            assert found["step"] == expected["step"] == 18
            assert found["position"] == expected["position"] and found["best"] == expected["best"]
            assert_equal_states(found["state"], expected["state"])
    for i, (_, run) in enumerate(stopped):
        assert losses(run) == losses(wholes[i // len(stops)][1])


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        for (offsets, tensor), (expected_offsets, expected_tensor) in zip(found[name], expected[name], strict=True):
            assert offsets == expected_offsets and torch.equal(tensor, expected_tensor), name


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Every logged step with its losses: the batches after a stop are those of the undisturbed run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def keep_few(ranks: Ranks, path: Path, run: Path) -> list[int]:
    """Train with an evaluation at every other step; the steps of the two best."""
    keys = [
        "train.epochs=2",
        "train.evaluate_every=2",
        "checkpoint.every_steps=1",
        "checkpoint.keep=2",
        "checkpoint.keep_best=2",
        "train.lr=0.1",
    ]
    trainer = Trainer(recipe_with(path, "row_wise", *keys), run, ranks, resume=False)
    trainer.fit()
    return trainer.evaluations.best_steps(2)


def test_the_newest_and_the_best_are_kept(log: Path, tmp_path: Path) -> None:
    best = run_on_ranks(2, keep_few, log, tmp_path / "run")[0]
    kept = committed(tmp_path / "run" / "checkpoints")
    assert [step_of(path) for path in kept] == sorted({11, 12, *best})
    assert len(kept) > 2, "the best ones are the newest ones: the test shows nothing"
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {path.name for path in kept}


def disturb(folder: Path, other: Path, disturbance: str) -> None:
    if disturbance == "manifest":
        manifest = folder / MANIFEST
        manifest.write_text(manifest.read_text().replace('"offsets": [0, 0]', '"offsets": [1, 0]', 1))
        return
    path = folder / "rank_1.0.safetensors"
    content = bytearray(path.read_bytes())
    if disturbance == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif disturbance == "cut":
        path.write_bytes(content[:-8])
    elif disturbance == "missing":
        path.unlink()
    else:
        shutil.copy(other / path.name, path)


def damage_and_open(ranks: Ranks, path: Path, whole: Path) -> list[str]:
    """For each disturbance of the newest checkpoint: which one opens; that the damaged file is named on every rank."""
    fit(ranks, path, [("row_wise", whole)], False)
    before, newest = committed(whole / "checkpoints")[-2:]
    found = []
    for disturbance in DISTURBANCES:
        run = whole.with_name(disturbance)
        if ranks.is_first:
            for folder in (before, newest):
                shutil.copytree(folder, run / "checkpoints" / folder.name)
            disturb(run / "checkpoints" / newest.name, before, disturbance)
        torch.distributed.barrier()
        try:
            Reader(run / "checkpoints" / newest.name)
            found.append("opened the damaged one")
        except InputError as error:
            assert ("manifest.json" if disturbance == "manifest" else "rank_1.0.safetensors") in str(error)
            found.append("before" if next(open_newest(run / "checkpoints")).folder.name == before.name else "another")
    return found


def test_damage_is_named_and_the_checkpoint_before_is_taken(log: Path, tmp_path: Path) -> None:
    for rank_result in run_on_ranks(2, damage_and_open, log, tmp_path / "whole"):
        assert rank_result == ["before"] * len(DISTURBANCES)


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", "step_30.writing", "step_40.deleting", "step_50.damaged", "step_x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    assert [path.name for path in committed(tmp_path)] == ["step_9", "step_10"]
    prune(tmp_path, keep=1, best=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_50.damaged", "step_x"]


WRONG_RESUMES = {
    "data.train=valid.parquet": "the training files changed",
    "tables.user.rows=98": "'tables.user.rows' differs from the recipe of this checkpoint (97 then, 98 now)",
    "features.length.scale=2.0": "'features.length.scale' differs from the recipe of this checkpoint (the default then, 2.0 now)",
    "train.embedding_optimizer=sgd": "'train.embedding_optimizer' differs from the recipe of this checkpoint (rowwise_adagrad then",
    "model.expert_layers=[16, 9]": "has shape [5, 8]",
    "train.seed=4": "'train.seed' differs from the recipe of this checkpoint (3 then, 4 now)",
    "data.shuffle_row_groups=2": "'data.shuffle_row_groups' differs",
    "data.memory_mb=512": "'data.memory_mb' differs",
    "features.length.transform=quantile": "'features.length.transform' differs",
    "tables.user.min_count=2": "'tables.user.min_count' differs",
    "tasks.ctr.nulls=mask": "'tasks.ctr.nulls' differs",
}


def move_the_mean(statistics: Path) -> None:
    content = json.loads(statistics.read_text())
    content["standard"]["length"]["mean"][0] += 1
    statistics.write_text(json.dumps(content))


def resume_wrongly(ranks: Ranks, path: Path, whole: Path) -> dict[str, tuple[str, str]]:
    """What resuming in the middle of an epoch says to each change, and the recipe it leaves in the run."""
    fit(ranks, path, [("table_wise", whole)], False)
    run = stopped_copy(whole, 3)
    messages = {}
    for change in [*WRONG_RESUMES, "not asked for", "other statistics"]:
        more = [change] if change in WRONG_RESUMES else []
        if change == "other statistics":
            move_the_mean(run / "fitted" / "statistics.json")
        try:
            Trainer(recipe_with(path, "row_wise", *FITTED, *more), run, ranks, resume=change != "not asked for")
            messages[change] = ("accepted", "")
        except InputError as error:
            messages[change] = (str(error), (run / "recipe.toml").read_text())
        gc.collect()  # the failed trainer's lock on the folder
    return messages


def test_resuming_what_does_not_fit_is_refused_and_changes_nothing(log: Path, tmp_path: Path) -> None:
    messages = run_on_ranks(1, resume_wrongly, log, tmp_path / "run")[0]
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    others = {
        "not asked for": "--resume",
        "other statistics": "fitted is not what step_3 was trained with; restore it or start another run",
    }
    for change, expected in (WRONG_RESUMES | others).items():
        message, recipe_afterwards = messages[change]
        assert expected in message, (change, message)
        assert recipe_afterwards == recipe


def train_twice_at_once(ranks: Ranks, path: Path, run: Path) -> str:
    first = Trainer(recipe_with(path, "row_wise"), run, ranks, resume=False)
    try:
        Trainer(recipe_with(path, "row_wise"), run, ranks, resume=False)
    except InputError as error:
        assert first.step == 0 and f"pid {os.getpid()} on " in str(error)
        return str(error)
    return "both train"


def test_two_trainings_never_share_a_run_folder(log: Path, tmp_path: Path) -> None:
    assert "another process trains" in run_on_ranks(1, train_twice_at_once, log, tmp_path / "run")[0]


def test_a_saved_recipe_reads_back_the_same(log: Path, tmp_path: Path) -> None:
    recipe = recipe_with(log, "row_wise", "train.patience=2")
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml") == recipe
