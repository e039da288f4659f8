"""Saving and loading against the disk's own rate, and how long training stands still: python -m tests.benchmarks.checkpoints

The disk's own rate is that of plain writes with one fsync at the end, and of plain reads past the page cache, as many at a time as there
are ranks, in the same folder, between the same repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tests.ranks import run_on_ranks
from triptych.launch.build import Built, build, load_model, load_optimizers, model_state, optimizer_state
from triptych.launch.checkpoints.manifest import committed, delete
from triptych.launch.checkpoints.parts import local_parts
from triptych.launch.checkpoints.reader import Reader
from triptych.launch.checkpoints.saver import CheckpointSection, Saver
from triptych.launch.config import Recipe
from triptych.launch.distributed import Ranks

DIM, REPEATS, BLOCK_BYTES = 32, 5, 4 << 20
GOALS = {"save of plain write": "at least 0.6", "load of plain read": "at least 0.6", "stall of save": "at most 0.1"}


def recipe(rows: int) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"root": "."},
            "tables": [{"name": "item", "rows": rows, "dim": DIM, "ids": "index", "sharding": "row_wise"}],
            "features": [{"name": "item", "kind": "id", "table": "item"}],
            "tasks": [{"name": "ctr", "kind": "binary", "label": "click"}],
            "model": {"sharing": "mmoe", "experts": 2, "expert_layers": [32], "tower_layers": [16]},
        }
    )


def forget(folder: Path) -> None:
    """Drop files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def plain_write(path: Path, size: int) -> None:
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())


def plain_read(path: Path) -> None:
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


class Clock:
    """Seconds from when all ranks begin to when all have ended."""

    def __enter__(self) -> Clock:
        dist.barrier()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        self.seconds = time.perf_counter() - self.began


def stalled(saver: Saver, step: int, built: Built) -> float:
    with Clock() as clock:
        saver.save(step, {**model_state(built), **optimizer_state(built)}, {}, {})
    return clock.seconds


def measure(ranks: Ranks, folder: Path, rows: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of a checkpoint, and the seconds of each repeat."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.world_size))
    built = build(recipe(rows), ranks)
    state = {**model_state(built), **optimizer_state(built)}
    own = sum(part.tensor.nbytes for value in state.values() for part in local_parts(value))
    times: dict[str, list[float]] = defaultdict(list)
    waiting, background = (Saver(folder, CheckpointSection(keep=1, background=kind), ranks) for kind in (False, True))
    background.prepare(state)
    background.wait()
    plain = folder / f"plain_{ranks.rank}"
    for repeat in range(REPEATS):
        with Clock() as clock:
            plain_write(plain, own)
        times["plain write"].append(clock.seconds)
        forget(folder)
        with Clock() as clock:
            plain_read(plain)
        times["plain read"].append(clock.seconds)
        dist.barrier()
        plain.unlink()
        times["save"].append(stalled(waiting, 2 * repeat + 1, built))
        forget(folder)
        with Clock() as clock:
            reader = Reader(committed(folder)[-1])
            load_model(built, reader)
            load_optimizers(built, reader)
        times["load"].append(clock.seconds)
        times["stall"].append(stalled(background, 2 * repeat + 2, built))
        with Clock() as clock:
            background.wait()
        times["in the background"].append(times["stall"][-1] + clock.seconds)
        dist.barrier()
        if ranks.is_first:
            for checkpoint in committed(folder):
                delete(checkpoint)
        dist.barrier()
    return own, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one, unless given")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = run_on_ranks(args.ranks, measure, Path(folder), int(args.gb * 1e9 / (DIM * 4 + 4)), timeout=1800)
    size, times = sum(own for own, _ in results), results[0][1]
    table = Table(title=f"{size / 1e9:.2f} GB, {args.ranks} ranks, median of {REPEATS}", title_justify="left")
    for name in ("what", "seconds", "GB/s", "least and most seconds"):
        table.add_column(name, justify="left" if name == "what" else "right")
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        table.add_row(name, f"{middle[name]:.2f}", f"{size / 1e9 / middle[name]:.2f}", f"{min(seconds):.2f} {max(seconds):.2f}")
    ratios = {
        "save of plain write": middle["plain write"] / middle["save"],
        "load of plain read": middle["plain read"] / middle["load"],
        "stall of save": middle["stall"] / middle["save"],
        "first stall of save": times["stall"][0] / middle["save"],
    }
    Console().print(table)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}" + (f", {GOALS[name]} wanted" if name in GOALS else ""))
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "seconds": times, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
