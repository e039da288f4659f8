"""The rank of training that the components start, with a ledger of the rows of every step: torchrun -m tests.cluster.rank ..."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from tests.faults.rank import Ledger
from triptych.launch import train
from triptych.launch.config import Recipe
from triptych.launch.distributed import Ranks
from triptych.launch.trainer import Trainer


class RecordedTrainer(Trainer):
    def __init__(self, recipe: Recipe, run: Path, ranks: Ranks, **more: Any) -> None:
        super().__init__(recipe, run, ranks, **more)
        # A node that only joined again has not counted what the others have.
        restarts = max(ranks.all_gather(int(os.environ["TORCHELASTIC_RESTART_COUNT"])))
        attempt = f"{int(os.environ.get('SLURM_RESTART_COUNT', '0')):02d}.{restarts:02d}"
        self.ledger = Ledger(Path(os.environ["LEDGERS"]) / f"ledger.{attempt}.{ranks.rank}.jsonl", self, lambda step: None)


if __name__ == "__main__":
    train.Trainer = RecordedTrainer  # type: ignore[misc]
    typer.run(train.main)
