"""One rank of a campaign: torchrun ... -m tests.faults.rank CAMPAIGN.json

It is the rank that `triptych train` starts. Besides, it keeps a ledger of the rows of every trained step, and carries out the kills of
the campaign's plan.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.kills import Executioner, Kill
from triptych.datasets.batch import Batch
from triptych.launch import train
from triptych.launch.checkpoints import snapshot, tensor_file
from triptych.launch.config import Recipe
from triptych.launch.distributed import Ranks
from triptych.launch.trainer import Trainer

FILE_BYTES, BLOCK_BYTES = 6000, 1000
"""Small, so that each rank has several files, and each file several blocks."""
LAUNCH = "CAMPAIGN_LAUNCH"
"""Environment variable: how often torchrun was started before."""


class Ledger:
    """Which rows this rank trained in which step, of one attempt: a first line of where it began, then one line a step.

    Args:
        path: a file of this rank and attempt alone.
        after_step: called with each step that was trained and written down.
    """

    def __init__(self, path: Path, trainer: Trainer, after_step: Callable[[int], None]) -> None:
        self.file, self.trainer, self.after_step = path.open("w"), trainer, after_step
        self.row_B = torch.empty(0)
        self._write({"from": trainer.step})
        self.forward, self.progress = trainer.pipeline._model_fwd, trainer.pipeline.progress
        trainer.pipeline._model_fwd = self._forward
        trainer.pipeline.progress = self._progress  # type: ignore[method-assign]

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps({"time": time.time(), **line}) + "\n")
        self.file.flush()

    def _forward(self, batch: Batch) -> Any:
        self.row_B = batch.row_B
        return self.forward(batch)

    def _progress(self, batches: Any) -> Any:
        report, step = self.progress(batches), self.trainer.step + 1
        self._write({"step": step, "rows": self.row_B[self.row_B >= 0].tolist()})
        self.after_step(step)
        return report


class HuntedTrainer(Trainer):
    """A trainer whose process is killed by the campaign's plan."""

    campaign: dict[str, Any]

    def __init__(self, recipe: Recipe, run: Path, ranks: Ranks, *, resume: bool, **more: Any) -> None:
        folder, undisturbed = run.parent, Path(self.campaign["undisturbed"])
        if not resume and not (undisturbed / "result.json").exists():
            Trainer(recipe, undisturbed, ranks, resume=False).fit()
        pids = ranks.all_gather(os.getpid())
        (folder / f"pid.{ranks.rank}").write_text(str(os.getpid()))
        attempt = f"{int(os.environ[LAUNCH]):02d}.{int(os.environ['TORCHELASTIC_RESTART_COUNT']):02d}"
        executioner = Executioner([Kill(*kill) for kill in self.campaign["kills"]], folder, ranks.rank, pids, attempt)
        executioner.arm()
        super().__init__(recipe, run, ranks, resume=resume, **more)
        self.ledger = Ledger(
            folder / f"ledger.{attempt}.{ranks.rank}.jsonl", self, lambda step: executioner.reached("step", f"step {step}")
        )


def main(campaign: dict[str, Any]) -> None:
    snapshot.FILE_BYTES, tensor_file.BLOCK_BYTES = FILE_BYTES, BLOCK_BYTES
    HuntedTrainer.campaign = campaign
    train.Trainer = HuntedTrainer  # type: ignore[misc]
    batch = campaign["global_batch"] // int(os.environ["WORLD_SIZE"])
    overrides = [*campaign["overrides"], f"data.batch_size={batch}"]
    train.main(campaign["recipe"], Path(campaign["folder"]) / "run", overrides, resume=os.environ[LAUNCH] != "0")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
