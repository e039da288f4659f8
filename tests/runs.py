"""Runs of tests: what a rank holds in the end, and a run as it was when it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.launch.build import Built, build
from triptych.launch.checkpoints.manifest import committed, step_of
from triptych.launch.checkpoints.parts import State, local_parts
from triptych.launch.checkpoints.saver import CheckpointSection, Saver
from triptych.launch.config import Recipe
from triptych.launch.distributed import Ranks
from triptych.launch.schedule import lr_factor


def local_values(state: State) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    return {name: [(part.offsets, part.tensor.clone()) for part in local_parts(value)] for name, value in state.items()}


def make_loader(recipe: Recipe, rank: int, world_size: int, split: str = "train") -> Loader:
    """Of one split, with nothing fitted."""
    schema = recipe.data_schema
    return Loader(
        Decoder(schema, Fitted()),
        list_slices(schema, [f"{recipe.data.root}/{split}.parquet"], labels=True).slices,
        rank=rank,
        world_size=world_size,
        seed=recipe.train.seed,
        shuffle=split == "train",
        window=3 if split == "train" else 1,
    )


def train_few(recipe: Recipe, ranks: Ranks, steps: int) -> Built:
    """A model after its first steps."""
    built = build(recipe, ranks)
    pipeline = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device)
    batches = make_loader(recipe, ranks.rank, ranks.world_size).batches(steps=steps)
    for step in range(steps):
        built.optimizers.scale_rates(lr_factor(recipe.train, step, steps))
        pipeline.progress(batches)
    pipeline.detach()
    return built


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
