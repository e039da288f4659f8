"""Rows of saved tables go to other rows of other parts: as indexing does, in any dtype, and without a second copy of the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import run_on_ranks
from tests.runs import save
from triptych.datasets.fitted import Vocabulary
from triptych.embeddings.dynamic.slot_map import RowShard
from triptych.launch.checkpoints import carried_ids, carried_tables
from triptych.launch.checkpoints import reader as reader_module
from triptych.launch.checkpoints.carried_tables import move_rows, vocabulary_sources
from triptych.launch.checkpoints.parts import Part
from triptych.launch.checkpoints.reader import Reader
from triptych.launch.distributed import Ranks

ROWS, DIM = 230, 8


def move_anywhere(ranks: Ranks, folder: Path) -> int:
    """Rectangles of a table of two ranks' rows, filled by random rows of it, in blocks of any size; how many values were checked."""
    whole = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))
    cut = 100
    own = whole[:cut] if ranks.is_first else whole[cut:]
    save(ranks, folder, {"x": RowShard(own.clone(), 0 if ranks.is_first else cut, ROWS)})
    reader, rng, checked = Reader(folder), np.random.default_rng(ranks.rank), 0
    for _ in range(60):
        carried_tables.BLOCK_BYTES = carried_ids.BLOCK_BYTES = reader_module.CONVERTED_BYTES = int(rng.integers(1, 3000))
        dtype = torch.float16 if rng.random() < 0.5 else torch.float32
        first_row, num_rows = int(rng.integers(0, 300)), int(rng.integers(0, 300))
        begin, end = sorted(rng.choice(DIM + 1, 2, replace=False).tolist())
        around = torch.zeros(num_rows, DIM + 3, dtype=dtype)
        part = Part((first_row, begin), around[:, begin:end])
        source_R = torch.from_numpy(rng.integers(-1, ROWS, num_rows))
        move_rows(reader, "x", part, source_R)
        expected = torch.where(source_R[:, None] < 0, 0.0, whole[source_R.clamp(min=0), begin:end]).to(dtype)
        assert torch.equal(part.tensor, expected)
        checked += expected.numel()
        low, high = sorted(rng.integers(0, ROWS + 1, 2).tolist())
        piece = Part((low, begin), torch.zeros(high - low, end - begin, dtype=dtype))
        reader.read_part("x", piece)
        assert torch.equal(piece.tensor, whole[low:high, begin:end].to(dtype))
        around[:, begin:end] = 0
        assert not around.any(), "nothing beside the part was written"
    return checked


def test_rows_go_where_they_are_sent(tmp_path: Path) -> None:
    assert min(run_on_ranks(2, move_anywhere, tmp_path / "step_1")) > 10_000


@pytest.mark.parametrize("first, rows", [(0, 12), (0, 3), (1, 5), (4, 30), (9, 1), (20, 4)])
def test_values_come_from_their_old_rows(first: int, rows: int) -> None:
    counts = np.ones(7, np.int64)
    old = Vocabulary(np.array([50, 10, 40, 20, 30, 60, 70]), counts)
    new = Vocabulary(np.array([20, 99, 50, 70, -5]), counts[:5])
    source_of_row = {0: 0, 1: 4, 2: 0, 3: 1, 4: 7, 5: 0}
    found = vocabulary_sources(old, new, Part((first, 0), torch.zeros(rows, 4)))
    assert found.tolist() == [source_of_row.get(row, -1) for row in range(first, first + rows)]


MEASURE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from triptych.launch.checkpoints.carried_tables import move_rows
from triptych.launch.checkpoints.parts import Part
from triptych.launch.checkpoints.reader import Reader

def peak_bytes():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
reader, rows = Reader(Path(sys.argv[1])), int(sys.argv[3])
table = torch.ones(rows, 16, dtype=getattr(torch, sys.argv[4]))
move_rows(reader, "warm", Part((0, 0), torch.ones(1000, 16)), torch.arange(1000).flip(0))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far
before = peak_bytes()
if sys.argv[2] == "move":
    move_rows(reader, "x", Part((0, 0), table), torch.arange(rows).flip(0))
else:
    reader.read_part("x", Part((0, 0), table))
print(peak_bytes() - before)
assert table.float().mean() == 2
"""


def write_checkpoint(ranks: Ranks, folder: Path, rows: int) -> None:
    save(ranks, folder, {"x": torch.full((rows, 16), 2.0), "warm": torch.ones(1000, 16)})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read and reset in Linux' /proc")
def test_no_second_copy_in_memory(tmp_path: Path) -> None:
    """A table of 256 MB: what is added is blocks and, where rows move, the places where they go: 40 bytes a row."""
    rows, block = 4_000_000, 32 << 20
    run_on_ranks(1, write_checkpoint, tmp_path / "step_1", rows)
    limits = {("move", "float32"): 40 * rows + 3 * block, ("read", "float32"): 2 * block, ("read", "float16"): 3 * block}
    for (kind, dtype), limit in limits.items():
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "step_1"), kind, str(rows), dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < limit, f"{kind} {dtype}: {int(done.stdout) / 1e6:.0f} MB"
