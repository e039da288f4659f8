"""Storage that fills up, turns read-only or vanishes while a run trains: the last checkpoint is whole, and the path is named."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.runs import local_values
from tests.small import write_log
from triptych.datasets.schema import InputError
from triptych.launch.build import model_state, optimizer_state
from triptych.launch.checkpoints.manifest import committed
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.trainer import Trainer

EVERY = 3
FAILS_AT = 8
"""The step after which storage fails: two checkpoints were committed, the third one cannot be."""
DISK_BYTES = 8 << 20
REASONS = {"full": "No space left on device", "read-only": "Read-only file system", "vanished": "No such file or directory"}


def mount(*args: str) -> bool:
    return subprocess.run(["mount", *args], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    """Small file systems of their own."""
    mounted = []
    try:
        for kind in REASONS:
            (tmp_path / kind).mkdir()
            if not mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(tmp_path / kind)):
                pytest.skip("may not mount a file system here")
            mounted.append(tmp_path / kind)
        yield tmp_path
    finally:
        for disk in mounted:
            while os.path.ismount(disk):
                subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fail(disk: Path) -> None:
    if disk.name == "full":
        with (disk / "filler").open("wb") as file:
            try:
                while file.write(bytes(1 << 16)):
                    file.flush()
            except OSError:
                pass
    elif disk.name == "read-only":  # over itself, as files are open below
        assert mount("--bind", str(disk), str(disk)) and mount("-o", "remount,bind,ro", str(disk))
    else:
        (disk / "run").rename(disk / "elsewhere")


def mend(disk: Path) -> None:
    if disk.name == "full":
        (disk / "filler").unlink()
    elif disk.name == "read-only":
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    else:
        (disk / "elsewhere").rename(disk / "run")


class FailingStorage(Trainer):
    """Its storage fails after a step."""

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        if step == FAILS_AT and self.ranks.is_first:
            self.saver.wait()
            fail(self.run.parent)


def train(ranks: Ranks, recipe: Path, runs: list[Path], background: bool, disturbed: bool, resume: bool) -> list[tuple[str, dict]]:
    """For each run: how it ended, and its final state."""
    ends = []
    keys = [f"checkpoint.every_steps={EVERY}", f"checkpoint.background={str(background).lower()}", "train.epochs=3"]
    for run in runs:
        trainer = (FailingStorage if disturbed else Trainer)(load_recipe(recipe, [*keys, "data.batch_size=128"]), run, ranks, resume=resume)
        try:
            trainer.fit()
            ends.append(("trained", local_values(model_state(trainer.built) | optimizer_state(trainer.built))))
        except InputError as error:
            ends.append((str(error), {}))
        trainer.lock.close()
    return ends


@pytest.mark.parametrize("background", [True, False])
def test_the_last_checkpoint_survives_and_training_goes_on(disks: Path, tmp_path_factory: pytest.TempPathFactory, background: bool) -> None:
    folder = tmp_path_factory.mktemp("log")
    recipe, runs = write_log(folder), [disks / kind / "run" for kind in REASONS]
    undisturbed = run_on_ranks(1, train, recipe, [folder / "run"], background, False, False)[0][0][1]
    failed = run_on_ranks(1, train, recipe, runs, background, True, False)[0]
    for (kind, reason), run, (end, _) in zip(REASONS.items(), runs, failed, strict=True):
        assert str(run) in end and reason in end and "--resume" in end, end
        mend(run.parent)
        assert [path.name for path in committed(run / "checkpoints")] == ["step_3", "step_6"], kind
    for end, state in run_on_ranks(1, train, recipe, runs, background, False, True)[0]:
        assert end == "trained" and state.keys() == undisturbed.keys()
        for name, parts in undisturbed.items():
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state[name], parts, strict=True)), name


def claim_there(ranks: Ranks, recipe: Path, run: Path) -> str:
    with pytest.raises(InputError) as error:
        Trainer(load_recipe(recipe), run, ranks, resume=False)
    return str(error.value)


def test_a_read_only_folder_is_named_before_training(disks: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe, disk = write_log(tmp_path_factory.mktemp("log")), disks / "read-only"
    fail(disk)
    assert str(disk / "run") in run_on_ranks(1, claim_there, recipe, disk / "run")[0]
    mend(disk)
    (disk / "run").mkdir()
    fail(disk)
    assert str(disk / "run") in run_on_ranks(1, claim_there, recipe, disk / "run")[0]
