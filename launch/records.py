"""What a run writes down: metrics.jsonl, TensorBoard, result.json. Only the first rank writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


def write_json(path: Path, content: Any) -> None:
    """Write beside, then rename: readers see the old content or the new, never half."""
    beside = path.with_name(path.name + ".writing")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


class Records:
    """`metrics.jsonl` and TensorBoard of one run.

    Args:
        from_step: lines of later steps are dropped: they belong to work that a resumed run does again.
    """

    def __init__(self, run: Path, from_step: int) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= from_step] if from_step else []
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def _lines(self) -> list[str]:
        # What follows the last line end is nothing, or half a line that a kill left.
        return self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        prefix = record.get("split", "train")
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
