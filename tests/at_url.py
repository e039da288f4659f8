"""Trainings whose run is at a URL, for tests; and what is compared of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tests.runs import local_values
from triptych.launch.build import model_state, optimizer_state
from triptych.launch.checkpoints.manifest import MANIFEST, committed
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.nodes.mirror import CACHE, Mirror, located
from triptych.launch.trainer import Trainer

SETTINGS = [
    "checkpoint.every_steps=2", "checkpoint.keep=2", "checkpoint.keep_best=1", "train.evaluate_every=3", "train.epochs=2",
    "data.batch_size=128", "model.dropout=0.2", "features.length.transform=standard", "tables.item.ids=vocabulary",
    "tables.user.ids=dynamic",
]  # fmt: skip


def url_of(folder: Path) -> str:
    """A URL that several processes see, of another file system than local folders have."""
    return f"local://{folder}"


def trainer(ranks: Ranks, log: Path, run: str, cache: Path, *, resume: bool, kind: type[Trainer] = Trainer, **overrides: Any) -> Trainer:
    os.environ[CACHE] = str(cache)
    folder, at_url = located(run)
    values = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    recipe = load_recipe(log, [*SETTINGS, *values])
    return kind(recipe, folder, ranks, resume=resume, mirror=Mirror(at_url, ranks) if at_url is not None else None)


def state_of(trained: Trainer) -> dict[str, Any]:
    return local_values(model_state(trained.built) | optimizer_state(trained.built))


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found[name], parts, strict=True)), name


def assert_same_checkpoints(remote: Path, local: Path) -> None:
    """The same ones, of the same files, and nothing besides."""
    names = [[path.name for path in committed(run / "checkpoints")] for run in (remote, local)]
    assert names[0] == names[1] == sorted(os.listdir(remote / "checkpoints"), key=lambda name: int(name[5:]))
    for name in names[0]:
        files = [sorted(os.listdir(run / "checkpoints" / name)) for run in (remote, local)]
        assert files[0] == files[1]
        for file in files[0]:
            if file != MANIFEST:
                assert (remote / "checkpoints" / name / file).read_bytes() == (local / "checkpoints" / name / file).read_bytes()


def train_there(ranks: Ranks, log: Path, run: str, cache: Path, batch_size: int = 128) -> dict[str, Any]:
    trained = trainer(ranks, log, run, cache, resume=False, data__batch_size=batch_size)
    assert trained.fit()
    return state_of(trained)
