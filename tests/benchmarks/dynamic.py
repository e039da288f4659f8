"""What dynamic ids cost, as ratios in one run: python -m tests.benchmarks.dynamic

rows/s of training and of evaluation with the user and the item table `dynamic`, over `hash` and `index`, on one rank and on two,
one thread each: reading and mapping have theirs beside it
CPU time of the mapping alone, hit rate, and memory of the id map
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.ranks import run_on_ranks
from triptych.datasets.batch import Batch
from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader, in_background
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import ReadingPosition
from triptych.launch.build import Built, build
from triptych.launch.config import Recipe
from triptych.launch.distributed import Ranks

from . import mt26

KINDS = ("index", "hash", "dynamic")
LARGE = ("id_0", "id_1")
"""Tables of users and items: 1,000,000 and 500,000 rows."""
TURN_ROWS, TURNS = 1 << 15, 6
"""Rows of all ranks that one turn trains. The first turn warms up, the others go on in the log: new ids keep coming."""
TIMEOUT_SECONDS = 1800


class Contender:
    """A model whose large tables have ids of one kind, and where it stands in the log."""

    def __init__(self, path: Path, ids: str, ranks: Ranks) -> None:
        plain = mt26.recipe(path, shuffle=False)
        tables = tuple(table.model_copy(update={"ids": ids} if table.name in LARGE else {}) for table in plain.tables)
        self.recipe: Recipe = plain.model_copy(update={"tables": tables})
        schema = self.recipe.data_schema
        slices = list_slices(schema, [str(path)], labels=True).slices
        self.loader = Loader(Decoder(schema, Fitted()), slices, rank=ranks.rank, world_size=ranks.world_size)
        self.built: Built = build(self.recipe, ranks)
        self.position = ReadingPosition()
        self.steps = TURN_ROWS // self.loader.global_batch_size

    def batches(self) -> Iterator[Batch]:
        """Of one turn. The first is here already: opening a row group is no part of what is measured."""
        read = self.loader.batches(self.position, self.steps)
        return chain([next(read)], read)

    def train(self) -> float:
        """Rows a second of one turn, as the trainer takes them."""
        dynamic, read = self.built.dynamic, self.batches()
        mapped = read if dynamic is None else in_background(lambda: dynamic.learned(read), self.recipe.data.prefetch)
        pipeline = TrainPipelineSparseDist(self.built.model, self.built.optimizers, self.built.device)
        began = time.perf_counter()
        for _ in range(self.steps):
            pipeline.progress(mapped)
            self.position = self.loader.after_step(self.position)
            if dynamic is not None:
                dynamic.after_step()
        taken = time.perf_counter() - began
        assert next(mapped, None) is None
        pipeline.detach()
        return TURN_ROWS / taken

    @torch.no_grad()
    def evaluate(self) -> float:
        """Rows a second of as many rows as a turn's."""
        self.built.model.eval()
        batches = self.batches()
        began = time.perf_counter()
        for batch in batches:
            self.built.model(self.built.found(batch))
        taken = time.perf_counter() - began
        self.built.model.train()
        return TURN_ROWS / taken

    def mapping(self) -> dict[str, float]:
        """CPU milliseconds of this thread to map a batch, of the ids that a turn trains next, and its memory."""
        dynamic, batches = self.built.dynamic, list(self.batches())
        assert dynamic is not None
        rows = dynamic.tally.report()
        work: dict[str, Callable[[], Any]] = {
            "evaluation, ms a batch": lambda: [dynamic.found(batch) for batch in batches],
            "training, ms a batch": lambda: [dynamic.after_step() for _ in dynamic.learned(iter(batches))],
        }
        figures = {}
        for name, run in work.items():
            began = time.thread_time()
            run()
            figures[name] = (time.thread_time() - began) / len(batches) * 1e3
        figures |= {f"hit rate, {table}": facts["hit_rate"] for table, facts in rows.items()}
        held = sum(value.tensor.nbytes for name, value in dynamic.state().items() if "/" in name)
        return figures | {"id map, MB a rank": held / 1e6}


def contest(ranks: Ranks, path: Path) -> dict[str, Any]:
    """{"training", "evaluation": {kind: rows a second}}, the best of turns that alternate, and the figures of the mapping."""
    contenders = {kind: Contender(path, kind, ranks) for kind in KINDS}
    best = {"training": dict.fromkeys(KINDS, 0.0), "evaluation": dict.fromkeys(KINDS, 0.0)}
    for turn in range(TURNS):
        for kind, contender in contenders.items():
            rates = {"evaluation": contender.evaluate(), "training": contender.train()}
            for what, rate in rates.items():
                best[what][kind] = max(best[what][kind], rate if turn else 0.0)
    return {**best, "mapping": contenders["dynamic"].mapping()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    console, found = Console(width=140), {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "log.parquet"
        mt26.write(path)
        rates = Table("ranks", "what", *(f"{kind}, rows/s" for kind in KINDS), "over index", "over hash", box=box.MARKDOWN)
        mapping = Table("ranks", "mapping alone", "", box=box.MARKDOWN)
        for world_size in (1, 2):
            found[world_size] = figures = run_on_ranks(world_size, contest, path, timeout=TIMEOUT_SECONDS)[0]
            for what in ("training", "evaluation"):
                index, hashed, dynamic = (figures[what][kind] for kind in KINDS)
                cells = (f"{rate:,.0f}" for rate in (index, hashed, dynamic))
                rates.add_row(str(world_size), what, *cells, f"{dynamic / index:.2f}", f"{dynamic / hashed:.2f}")
            for name, value in figures["mapping"].items():
                mapping.add_row(str(world_size), name, f"{value:.3g}")
    console.print(rates)
    console.print(mapping)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
