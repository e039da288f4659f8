"""Runs of tests: what a rank holds in the end, and a run as it was when it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from triptych.launch.checkpoints.manifest import committed, step_of
from triptych.launch.checkpoints.parts import State, local_parts
from triptych.launch.checkpoints.saver import CheckpointSection, Saver
from triptych.launch.distributed import Ranks


def local_values(state: State) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    return {name: [(part.offsets, part.tensor.clone()) for part in local_parts(value)] for name, value in state.items()}


def save(ranks: Ranks, folder: Path, state: State, own: Mapping[str, torch.Tensor] | None = None) -> None:
    """Commit `folder`, which is named step_N."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    Saver(folder.parent, CheckpointSection(keep=1000, background=False), ranks).save(step_of(folder), state, own or {}, {})


def stopped_copy(whole: Path, stop: int) -> Path:
    """The run as it was when it stopped after step `stop`."""
    run = whole.with_name(f"{whole.name}_stopped_{stop}")
    shutil.copytree(whole, run)
    for folder in committed(run / "checkpoints"):
        if step_of(folder) > stop:
            shutil.rmtree(folder)
    (run / "result.json").unlink()
    return run
