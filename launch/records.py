"""What a run writes down as it goes: metrics.jsonl, TensorBoard. Only the first rank writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from .writing import write_text, written


class Records:
    """`metrics.jsonl` and TensorBoard of one run.

    Args:
        from_step: lines of later steps are dropped: they belong to work that a resumed run does again.
        evaluates_again: so does the evaluation of that very step.
    """

    def __init__(self, run: Path, from_step: int, *, evaluates_again: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        kept = []
        for line in self._lines() if from_step else ():
            record = json.loads(line)
            if record["step"] < from_step or (record["step"] == from_step and not (evaluates_again and "split" in record)):
                kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))
        with written(run / "tensorboard"):
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def _lines(self) -> list[str]:
        # What follows the last line end is nothing, or half a line that a kill left.
        return self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []

    def write(self, record: dict[str, Any]) -> None:
        with written(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        prefix = record.get("split", "train")
        with written(Path(self.board.log_dir)):
            for name, value in _scalars(record):
                self.board.add_scalar(f"{prefix}/{name}", value, record["step"])
            self.board.flush()


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "epoch", "rows"):
            found.append((prefix + key, float(value)))
    return found


def what_was_left_out(data: dict[str, Any]) -> list[str]:
    """What `data` of result.json says in lines."""
    skipped, said = data["skipped"], []
    if skipped["files"]:
        said.append(f"skipped {skipped['rows']} training rows in {skipped['files']} files; first: {skipped['reasons'][0]}")
    if data["bad_steps"]:
        said.append(f"{data['bad_steps']} steps with a loss or gradient that was not finite")
    if data["zeroed_gradients"]:
        said.append(f"{data['zeroed_gradients']} gradients of looked-up vectors were not finite and became 0")
    for task, counts in data["capped"].items():
        said.append(f"{task}: {counts['negative']} negative durations set to 0, {counts['above_cap']} cut to the cap")
    return said
