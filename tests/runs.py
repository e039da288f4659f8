"""Runs of tests: what a rank holds in the end, and a run as it was when it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from triptych.launch import checkpoint


def local_values(state: checkpoint.State) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    return {name: [(part.offsets, part.tensor.clone()) for part in checkpoint.local_parts(value)] for name, value in state.items()}


def stopped_copy(whole: Path, stop: int) -> Path:
    """The run as it was when it stopped after step `stop`."""
    run = whole.with_name(f"{whole.name}_stopped_{stop}")
    shutil.copytree(whole, run)
    for folder in checkpoint.committed(run / "checkpoints"):
        if int(folder.name.removeprefix("step_")) > stop:
            shutil.rmtree(folder)
    (run / "result.json").unlink()
    return run
