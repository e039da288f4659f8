"""The training loop: batch -> pipeline -> log -> evaluate -> checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from ..datasets.batch import Batch
from ..datasets.fitted import Fitted
from ..datasets.loader import Tally, in_background
from ..datasets.parquet.listing import list_slices
from ..datasets.row_groups import ReadingPosition
from ..datasets.schema import InputError
from ..embeddings.plan import Plan
from ..embeddings.sharding import prefetches
from ..mmoe.losses import sum_over_ranks
from ..mmoe.train_task import StepReport
from .build import build, load_model, load_optimizers, model_state, optimizer_state
from .checkpoints.reader import open_newest
from .checkpoints.saver import Saver
from .checkpoints.start_from import start_from
from .config import Recipe, meaning, save_recipe
from .console import ProgressLines, say, summary
from .distributed import Ranks
from .evaluations import Evaluations
from .faults.bad_steps import BadSteps, TooManyBadSteps
from .faults.stages import stage
from .faults.stop import StopRequest
from .feed import BATCHES_IN_PIPELINE, Feed, fit, train_loader
from .inference import Split, split_files
from .nodes.facts import record_start
from .nodes.mirror import Mirror
from .records import Records, what_was_left_out
from .run_folder import check_same, enter, shown
from .schedule import lr_factor
from .writing import write_json


class Trainer:
    """Trains one recipe in one run folder. Every rank makes one and calls `fit`.

    Args:
        plan: which rank holds which part of which table; the first rank's counts. Made here, unless given.
        mirror: where the run is at a URL: `run` is then this node's folder that stands for it.
    Raises:
        InputError: files, columns or a plan that do not fit; a checkpoint of other data or of another model.
    """

    def __init__(
        self, recipe: Recipe, run: Path, ranks: Ranks, *, resume: bool, plan: Plan | None = None, mirror: Mirror | None = None
    ) -> None:
        self.recipe, self.section, self.run, self.ranks, self.mirror = recipe, recipe.train, run, ranks, mirror
        self.checkpoints = run / "checkpoints"
        self.lock, goes_on = enter(run, ranks, resume=resume, mirror=mirror)
        schema = recipe.data_schema
        stage("listing the training files")
        train_files = split_files(schema, str(recipe.data.train))
        self.listing = ranks.from_first(lambda: list_slices(schema, train_files, labels=True))
        self.fitted = ranks.from_first(lambda: Fitted.load(run, schema)) if goes_on else fit(recipe, self.listing, ranks)
        self.loader = train_loader(recipe, self.listing, self.fitted, ranks)
        self.valid = Split("valid", schema, recipe.tasks, recipe.data.valid, ranks, self.fitted) if recipe.data.valid else None
        stage("building the model")
        self.built = build(recipe, ranks, plan)
        pipeline = PrefetchTrainPipelineSparseDist if prefetches(recipe.tables, ranks.device) else TrainPipelineSparseDist
        self.pipeline = pipeline(self.built.model, self.built.optimizers, ranks.device)
        self.step, self.position = 0, ReadingPosition()
        self.evaluation_due = False
        self.evaluations = Evaluations(self.section, recipe.tasks)
        self.bad_steps = BadSteps(self.section.max_bad_steps, self.listing.slices, self.built, ranks)
        self.saver = Saver(self.checkpoints, recipe.checkpoint, ranks, mirror)
        self.stop, self.stopping = StopRequest.of_this_process(), False
        if resume:
            self._resume()
        if self.step == 0:
            self._start_at_label_means()
            if recipe.checkpoint.start_from is not None:
                start_from(self.built, recipe, self.fitted, ranks, run)
        self.saver.prepare({**model_state(self.built), **optimizer_state(self.built)})
        self.progress = ProgressLines("train", ranks.is_first)
        if ranks.is_first:
            if not self.finished:
                save_recipe(recipe, run / "recipe.toml")
            if not goes_on:
                self.fitted.save(run)
            write_json(run / "plan.json", self.built.plan.described())
            self.records = Records(run, self.step, evaluates_again=self.evaluation_due)
        record_start(run, "train", self.step, ranks)

    @property
    def finished(self) -> bool:
        out_of_patience = 0 < self.section.patience <= self.evaluations.since_best
        return not self.evaluation_due and (self.position.epoch >= self.section.epochs or out_of_patience)

    def fit(self) -> bool:
        """Train to the end, evaluating and saving on the way; leaves result.json.

        Returns:
            False if it was asked to stop before: it saved, and goes on from there with `resume`.
        """
        if self.ranks.is_first and self.finished:
            say(f"the run is finished at step {self.step}: nothing to train")
        if self.ranks.is_first and not self.finished and self.section.warmup_steps >= self._total_steps():
            say(f"train.warmup_steps = {self.section.warmup_steps} is longer than the training of {self._total_steps()} steps")
        while not self.finished:
            if not self.evaluation_due:
                self.evaluation_due = self._train_until_evaluation() and self.valid is not None
                self._save()
            if self.evaluation_due and not self._is_to_stop():
                self._evaluate()
                self.evaluation_due = False
                self.saver.amend(self.step, self._facts(), self._best_steps())
            if self._is_to_stop() and not self.finished:
                self._commit()
                return False
        self._commit()
        self._finish()
        return True

    def _is_to_stop(self) -> bool:
        """Whether any rank was asked to, or cannot save. Collective."""
        self.stopping = any(self.ranks.all_gather(self.stopping or self.stop.asked or self.saver.failed))
        return self.stopping

    def _total_steps(self) -> int:
        later_epochs = self.section.epochs - self.position.epoch - 1
        return self.step + self.loader.steps_left(self.position) + later_epochs * self.loader.steps_left(ReadingPosition())

    def _train_until_evaluation(self) -> bool:
        """Train to the next evaluation: the end of the epoch, or `evaluate_every` steps. False if it was asked to stop before."""
        every = self.section.evaluate_every
        steps, total = self.loader.steps_left(self.position), self._total_steps()
        if every:
            steps = min(steps, every - self.step % every)
        last, save_every = self.step + steps, self.recipe.checkpoint.every_steps
        batches = self.loader.batches(self.position, steps)
        while self.step < last:
            self._train_steps(Feed(batches, self.step, min(last, self.step + save_every - self.step % save_every)), total)
            if self.stopping and self.step < last:
                return False
            if self.step < last:
                self._save()
        assert next(batches, None) is None
        return True

    def _train_steps(self, feed: Feed, total: int) -> None:
        """Train on the batches of a feed. Nothing is taken or mapped beyond them: a checkpoint may follow."""
        logged, began, epoch = self.step, time.monotonic(), self.position.epoch
        mapped = self._mapped(iter(feed))
        while self.step < feed.last:
            self.built.optimizers.scale_rates(lr_factor(self.section, self.step, total))
            self.built.task.objective.stop_asked = self.stop.asked or self.saver.failed
            stage(f"training step {self.step + 1}")
            report = self.pipeline.progress(mapped)
            self.step += 1
            self.position = self.loader.after_step(self.position)
            self._look_at(report)
            if self.built.dynamic is not None:
                self.built.dynamic.after_step()
            if report.stop and not self.stopping:
                self.stopping = True
                feed.end_after(self.step + self.recipe.data.prefetch + BATCHES_IN_PIPELINE)
            if self.step % self.section.log_every == 0 or self.step == feed.last:
                now = time.monotonic()
                self._log(report.losses_L, epoch, total, (self.step - logged) * self.loader.global_batch_size / (now - began))
                logged, began = self.step, now
        # The pipeline notices the end of its batches, and lets go of them.
        assert next(mapped, None) is None
        self.pipeline.detach()

    def _look_at(self, report: StepReport) -> None:
        try:
            self.bad_steps.after_step(self.step, report)
        except TooManyBadSteps:
            self._commit()  # of what was trained before
            raise

    def _mapped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches with rows in place of dynamic ids, found ahead of training in a thread."""
        dynamic = self.built.dynamic
        if dynamic is None:
            return batches
        return in_background(lambda: dynamic.learned(batches), self.recipe.data.prefetch)

    def _log(self, losses_L: torch.Tensor, epoch: int, total: int, rows_per_second: float) -> None:
        if not self.ranks.is_first:
            return
        self._record_saved()
        values = (loss if math.isfinite(loss) else None for loss in losses_L.tolist())
        losses = dict(zip(self.built.task.objective.loss_names, values, strict=True))
        note = ", ".join(f"{name} {'n/a' if loss is None else format(loss, '.4f')}" for name, loss in losses.items())
        self.progress(self.step, total, f"epoch {epoch + 1}/{self.section.epochs}, {rows_per_second:,.0f} rows/s, loss: {note}")
        record: dict[str, Any] = {"step": self.step, "epoch": epoch, "rows_per_second": rows_per_second, "loss": losses}
        record["bad_steps"] = self.bad_steps.count
        if self.built.dynamic is not None:
            record["ids"] = self.built.dynamic.tally.report()
        self.records.write(record)

    def _evaluate(self) -> None:
        """Evaluate on `valid`; every rank learns whether it is the best so far."""
        assert self.valid is not None
        metrics = self.valid.evaluate(self.built, self.step, ProgressLines("evaluate", self.ranks.is_first))
        message: list[Any] = [None]
        if metrics is not None:
            say(f"valid at step {self.step}: {summary(metrics)}")
            self.records.write(metrics)
            message[0] = metrics
        dist.broadcast_object_list(message)
        self.evaluations.add(self.step, message[0])

    def _start_at_label_means(self) -> None:
        """Of the first batch that holds labels; where rows are skipped, the very first may not. Collective."""
        for batch in self.loader.batches():
            stage("taking the means of the labels")
            batch = batch.to(self.ranks.device)
            if sum_over_ranks((batch.known_BT * batch.weight_B[:, None]).sum()) > 0:
                self.built.task.start_at_label_means(batch)
                return

    def _gather_tally(self) -> None:
        """The first rank takes in what the others skipped and capped. Collective."""
        tally = self.loader.tally
        for part in self.ranks.gather(tally.copy()):
            tally.update(part)
        now = tally.copy()
        if now.skipped_rows == self.loader.num_rows:
            raise InputError(f"no training row could be read; {now.report()['skipped']['reasons'][0]}")

    def _facts(self) -> dict[str, Any]:
        return {
            "reading": self.loader.state_dict(self.position),
            "tally": asdict(self.loader.tally.copy()),
            "fitted": self.fitted.digest(),
            "meaning": meaning(self.recipe),
            "evaluations": self.evaluations.state(),
            "evaluation_due": self.evaluation_due,
            "bad_steps": self.bad_steps.state(),
        }

    def _save(self) -> None:
        own = {"random_state": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            own["cuda_random_state"] = torch.cuda.get_rng_state(self.ranks.device)
        self._gather_tally()
        self.saver.save(self.step, {**model_state(self.built), **optimizer_state(self.built)}, own, self._facts(), self._best_steps())
        self._record_saved()

    def _best_steps(self) -> list[int]:
        return self.evaluations.best_steps(self.recipe.checkpoint.keep_best)

    def _commit(self) -> None:
        """Until the last checkpoint is whole."""
        self.saver.wait()
        self._record_saved()

    def _record_saved(self) -> None:
        for saved in self.saver.take_finished() if self.ranks.is_first else ():
            self.records.write({"step": saved.step, "checkpoint": saved._asdict()})

    def _resume(self) -> None:
        reader = next(open_newest(self.checkpoints, self.mirror), None)
        if reader is None:
            if self.ranks.is_first:
                say("nothing to resume: the run has no checkpoint; starting from the beginning")
            return
        facts = reader.manifest
        check_same(self.recipe, self.fitted, reader.folder, facts)
        try:
            position = self.loader.load_state_dict(facts["reading"])
        except InputError as error:
            raise InputError(f"{reader.folder}: {error}") from error
        load_model(self.built, reader)
        load_optimizers(self.built, reader)
        self.step, self.position = facts["step"], position
        # Files that are left out now are known; they may have moved.
        self.loader.tally.update(Tally(**facts["tally"] | {"bad_files": {}}))
        self.evaluations.load(facts["evaluations"])
        self.evaluation_due = facts["evaluation_due"]
        self.bad_steps.load(facts["bad_steps"])
        self.saver.prune(self._best_steps())
        for name, restore in (("random_state", torch.set_rng_state), ("cuda_random_state", torch.cuda.set_rng_state)):
            random_state = reader.read_own(name)
            if random_state is not None:
                restore(random_state)
        if self.ranks.is_first:
            where = shown(reader.folder, self.mirror)
            say(f"resumed from {where}: epoch {self.position.epoch + 1}, row {self.position.row} of {self.loader.num_rows}")

    def _finish(self) -> None:
        if not self.ranks.is_first:
            return
        result = self.evaluations.best or {"split": None, "rows": 0, "step": self.step, "tasks": {}}
        data = {"rows": self.loader.num_rows, **self.loader.tally.report(), **self.bad_steps.report()}
        write_json(self.run / "result.json", result | {"data": data})
        if self.mirror is not None:
            self.mirror.upload_small()
        for line in what_was_left_out(data):
            say(line)
        say(f"done: step {self.step}, best step {result['step']}, {shown(self.run / 'result.json', self.mirror)}")
