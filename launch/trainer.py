"""The training loop: batch -> pipeline -> log -> evaluate -> checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ..datasets.files import list_row_groups
from ..datasets.loader import Loader
from ..datasets.row_groups import ReadingPosition, fingerprint
from ..datasets.schema import InputError
from . import checkpoint
from .build import build, load_model, load_optimizers, model_state, optimizer_state
from .config import Recipe, meaning, save_recipe
from .console import ProgressLines, say, summary
from .distributed import Ranks
from .inference import Split, split_files
from .records import Records, write_json
from .run_folder import claim, lock
from .sections import BETTER_WHEN_LARGE


class Trainer:
    """Trains one recipe in one run folder. Every rank makes one and calls `fit`.

    Raises:
        InputError: files, columns or a plan that do not fit; a checkpoint of other data or of another model.
    """

    def __init__(self, recipe: Recipe, run: Path, ranks: Ranks, *, resume: bool) -> None:
        self.recipe, self.section, self.run, self.ranks = recipe, recipe.train, run, ranks
        self.checkpoints = run / "checkpoints"
        if ranks.is_first:
            claim(run, resume=resume)
            self.lock = lock(run)
        self.loader = self._train_loader()
        self.valid = Split("valid", recipe.data_schema, recipe.tasks, recipe.data.valid, ranks) if recipe.data.valid else None
        self.built = build(recipe, ranks)
        self.pipeline = TrainPipelineSparseDist(self.built.model, self.built.optimizers, ranks.device)
        self.step, self.position = 0, ReadingPosition()
        self.best: dict[str, Any] | None = None
        self.evaluations_since_best = 0
        if resume:
            self._resume()
        if self.step == 0:
            first_batch = next(self.loader.batches(steps=1))
            self.built.task.start_at_label_means(first_batch.to(ranks.device))
        self.progress = ProgressLines("train", ranks.is_first)
        if ranks.is_first:
            save_recipe(recipe, run / "recipe.toml")
            write_json(run / "plan.json", self.built.plan())
            self.records = Records(run, self.step)

    def _train_loader(self) -> Loader:
        schema, data = self.recipe.data_schema, self.recipe.data
        assert data.train is not None
        return Loader(
            schema,
            list_row_groups(split_files(schema, data.train)),
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.section.seed,
            shuffle=data.shuffle,
            window=data.shuffle_row_groups if data.shuffle else 1,
        )

    @property
    def finished(self) -> bool:
        out_of_patience = 0 < self.section.patience <= self.evaluations_since_best
        return self.position.epoch >= self.section.epochs or out_of_patience

    def fit(self) -> None:
        """Train to the end, evaluating and saving on the way; leaves result.json."""
        while not self.finished:
            self._train_until_evaluation()
            if self.valid is not None:
                self._evaluate()
            self._save()
        self._finish()

    def _train_until_evaluation(self) -> None:
        """Train to the next evaluation: the end of the epoch, or `evaluate_every` steps."""
        epoch, every = self.position.epoch, self.section.evaluate_every
        steps = self.loader.steps_left(self.position)
        later_epochs = self.section.epochs - epoch - 1
        total = self.step + steps + later_epochs * self.loader.steps_left(ReadingPosition())
        if every:
            steps = min(steps, every - self.step % every)
        last, logged, began = self.step + steps, self.step, time.monotonic()
        batches = self.loader.batches(self.position, steps)
        while self.step < last:
            report = self.pipeline.progress(batches)
            self.step += 1
            self.position = self.loader.after_step(self.position)
            if self.step % self.section.log_every == 0 or self.step == last:
                now = time.monotonic()
                self._log(report.losses_L, epoch, total, (self.step - logged) * self.loader.global_batch_size / (now - began))
                logged, began = self.step, now
            if self.step % self.recipe.checkpoint.every_steps == 0 and self.step < last:
                self._save()
        # The pipeline notices the end of its batches, and lets go of them.
        assert next(batches, None) is None
        self.pipeline.detach()

    def _log(self, losses_L: torch.Tensor, epoch: int, total: int, rows_per_second: float) -> None:
        if not self.ranks.is_first:
            return
        losses = dict(zip(self.built.task.objective.loss_names, losses_L.tolist(), strict=True))
        note = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.progress(self.step, total, f"epoch {epoch + 1}/{self.section.epochs}, {rows_per_second:,.0f} rows/s, loss: {note}")
        self.records.write({"step": self.step, "epoch": epoch, "rows_per_second": rows_per_second, "loss": losses})

    def _evaluate(self) -> None:
        """Evaluate on `valid`; every rank learns whether it is the best so far."""
        assert self.valid is not None
        metrics = self.valid.evaluate(self.built.model, self.step, ProgressLines("evaluate", self.ranks.is_first))
        message: list[Any] = [None]
        if metrics is not None:
            say(f"valid at step {self.step}: {summary(metrics)}")
            self.records.write(metrics)
            task, metric = self.section.watched(self.recipe.tasks)
            message[0] = {"step": self.step, "value": metrics["tasks"][task][metric], "metrics": metrics}
        dist.broadcast_object_list(message)
        if self._is_better(message[0]["value"]):
            self.best, self.evaluations_since_best = message[0], 0
        else:
            self.evaluations_since_best += 1

    def _is_better(self, value: float | None) -> bool:
        if self.best is None or self.best["value"] is None:
            return True
        sign = 1 if self.section.watched(self.recipe.tasks)[1] in BETTER_WHEN_LARGE else -1
        return value is not None and sign * value > sign * self.best["value"]

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": {"epoch": self.position.epoch, "row": self.position.row},
            "data": fingerprint(self.loader.row_groups),
            "order": self._order(),
            "meaning": meaning(self.recipe),
            "best": self.best,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def _order(self) -> dict[str, Any]:
        """What, beside the files, the order of rows is a function of: a reading position is only good for one."""
        data = self.recipe.data
        return {"train.seed": self.section.seed, "data.shuffle": data.shuffle, "data.shuffle_row_groups": data.shuffle_row_groups}

    def _check_same(self, folder: Path, facts: dict[str, Any]) -> None:
        if facts["data"] != fingerprint(self.loader.row_groups):
            raise InputError(f"{folder}: the training files changed since this checkpoint; restore them or start another run")
        then = facts["meaning"] | facts["order"]
        now = meaning(self.recipe) | (self._order() if facts["position"]["row"] else {})
        for key, value in now.items():
            if then[key] != value:
                what = f" ({then[key]} then, {value} now)" if not isinstance(value, list) else ""
                raise InputError(f"{folder}: '{key}' differs from the recipe of this checkpoint{what}; restore it or start another run")

    def _save(self) -> None:
        folder = self.checkpoints / f"step_{self.step}"
        own = {"random_state": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            own["cuda_random_state"] = torch.cuda.get_rng_state(self.ranks.device)
        checkpoint.save(folder, model_state(self.built) | optimizer_state(self.built), own, self._facts())
        if self.ranks.is_first:
            checkpoint.prune(self.checkpoints, self.recipe.checkpoint.keep, f"step_{self.best['step']}" if self.best else None)

    def _resume(self) -> None:
        reader = next(checkpoint.open_newest(self.checkpoints), None)
        if reader is None:
            if self.ranks.is_first:
                say("nothing to resume: the run has no checkpoint; starting from the beginning")
            return
        facts = reader.manifest
        self._check_same(reader.folder, facts)
        load_model(self.built, reader)
        load_optimizers(self.built, reader)
        self.step, self.position = facts["step"], ReadingPosition(**facts["position"])
        self.best, self.evaluations_since_best = facts["best"], facts["evaluations_since_best"]
        for name, restore in (("random_state", torch.set_rng_state), ("cuda_random_state", torch.cuda.set_rng_state)):
            random_state = reader.read_own(name)
            if random_state is not None:
                restore(random_state)
        if self.ranks.is_first:
            say(f"resumed from {reader.folder}: epoch {self.position.epoch + 1}, row {self.position.row} of {self.loader.num_rows}")

    def _finish(self) -> None:
        if not self.ranks.is_first:
            return
        result = self.best["metrics"] if self.best else {"split": None, "rows": 0, "step": self.step, "tasks": {}}
        write_json(self.run / "result.json", result)
        say(f"done: step {self.step}, best step {result['step']}, {self.run / 'result.json'}")
