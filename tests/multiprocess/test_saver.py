"""Saving: what is saved is the moment it was asked for, what it took is told, and what one rank cannot write all ranks hear of."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks
from triptych.datasets.schema import InputError
from triptych.embeddings.dynamic.slot_map import RowShard
from triptych.launch.checkpoints import snapshot
from triptych.launch.checkpoints.manifest import committed
from triptych.launch.checkpoints.reader import Reader
from triptych.launch.checkpoints.saver import CheckpointSection, Saved, Saver
from triptych.launch.distributed import Ranks
from triptych.launch.faults.reasons import RankFailure

ROWS, DIM = 1000, 4


def state_of(ranks: Ranks) -> dict[str, torch.Tensor | RowShard]:
    """Rows of a table on each rank, one tensor that all share, and one that is not contiguous."""
    rows = torch.arange(float(ROWS * DIM)).view(ROWS, DIM)
    return {
        "table": RowShard(rows + ROWS * ranks.rank, ROWS * ranks.rank, ROWS * ranks.world_size),
        "shared": torch.ones(7),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }


def save_and_go_on(ranks: Ranks, folder: Path) -> list[tuple[list[Saved], bool]]:
    """With and without waiting: what was told, and whether what was saved is what it was when it was asked for."""
    found = []
    for step, background in enumerate((False, True, True), 1):
        saver = Saver(folder, CheckpointSection(keep=5, background=background), ranks)
        state = state_of(ranks)
        if step == 3:
            saver.prepare(state)
        saver.save(step, state, {"own": torch.tensor(ranks.rank)}, {"fact": step})
        for value in state.values():
            (value.tensor if isinstance(value, RowShard) else value).zero_()  # training goes on
        saver.wait()
        reader, expected = Reader(committed(folder)[-1]), state_of(ranks)
        held = RowShard(torch.empty(ROWS, DIM), ROWS * ranks.rank, ROWS * ranks.world_size)
        reader.copy_into("table", held)
        same = [torch.equal(held.tensor, expected["table"].tensor), reader.read_own("own") == ranks.rank, reader.manifest["fact"] == step]
        same += [torch.equal(reader.read(name), expected[name]) for name in ("shared", "turned")]
        found.append((saver.take_finished(), all(same)))
    return found


def test_what_is_saved_is_the_moment_and_what_it_took_is_told(tmp_path: Path) -> None:
    for found in run_on_ranks(2, save_and_go_on, tmp_path):
        assert all(same for _, same in found)
        [[foreground], [background], [prepared]] = [finished for finished, _ in found]
        assert (foreground.step, background.step, prepared.step) == (1, 2, 3)
        assert foreground.bytes == background.bytes == 2 * ROWS * DIM * 4 + (7 + 6) * 4 + 2 * 8
        assert foreground.stalled_s >= foreground.written_s > 0
        assert background.stalled_s > 0 and background.written_s > 0


def fail_on_one(ranks: Ranks, folder: Path, error: Exception, background: bool) -> tuple[str, str]:
    """What every rank hears where the last one cannot write."""
    saver = Saver(folder, CheckpointSection(background=background), ranks)
    saver.save(1, state_of(ranks), {}, {})
    saver.wait()

    def cannot(path: Path, tensors: Any) -> None:
        raise error

    if ranks.rank == ranks.world_size - 1:
        snapshot.write_tensors = cannot
    with pytest.raises((InputError, RankFailure)) as raised:
        saver.save(2, state_of(ranks), {}, {})
        saver.wait()
    return type(raised.value).__name__, str(raised.value)


@pytest.mark.parametrize("background", [True, False])
def test_what_one_rank_cannot_write_all_hear_of(tmp_path: Path, background: bool) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/rank_1")
    for error, kind, words in ((full, "InputError", "/elsewhere/rank_1: cannot"), (RuntimeError("torn"), "RankFailure", "torn")):
        folder = tmp_path / kind
        folder.mkdir()
        heard = run_on_ranks(2, fail_on_one, folder, error, background)
        assert heard[0] == heard[1] and heard[0][0] == kind
        assert words in heard[0][1] and "step_1 is whole; mend this and go on with --resume" in heard[0][1]
        assert [path.name for path in folder.iterdir()] == ["step_1"]
