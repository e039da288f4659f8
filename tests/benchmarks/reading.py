"""How fast and how small reading is, as ratios in one run: python -m tests.benchmarks.reading [--giant-gb 20]

rows to Batches over a raw scan of the same columns, one thread each     over to_pylist
training that reads over training on batches in memory                   memory while a file of one giant row group is read
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.launch.build import build
from triptych.launch.config import Recipe
from triptych.launch.distributed import process_group

from . import mt26

REPEATS = 5
PYLIST_ROWS = 5_000
TRAINED_STEPS, ROUNDS = 40, 5


def loader(recipe: Recipe) -> Loader:
    """The training loader of the recipe on one rank."""
    schema, data = recipe.data_schema, recipe.data
    slices = list_slices(schema, [f"{data.root}/{data.train}"], labels=True).slices
    window = data.shuffle_row_groups if data.shuffle else 1
    return Loader(Decoder(schema, Fitted()), slices, rank=0, world_size=1, shuffle=data.shuffle, window=window)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def exhaust(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def raw_scan(path: Path, columns: list[str], *, verify: bool) -> None:
    """Every row group into Arrow memory, by one thread."""
    file = pq.ParquetFile(path, page_checksum_verification=verify)
    for number in range(file.metadata.num_row_groups):
        file.read_row_group(number, columns=columns, use_threads=False)


def pylist_scan(path: Path, columns: list[str]) -> None:
    pq.ParquetFile(path).read_row_group(0, columns=columns, use_threads=False).slice(0, PYLIST_ROWS).to_pylist()


def reading_rates(folder: Path) -> list[dict[str, Any]]:
    """Rows a second of the raw scan and of the loader, the best of REPEATS turns that alternate."""
    torch.set_num_threads(1)
    results = []
    for compression in ("zstd", "none"):
        path = folder / f"{compression}.parquet"
        columns = loader(mt26.recipe(path)).decoder.columns
        # workers = 0: everything in this thread, as in the raw scan.
        work: dict[str, Callable[[], None]] = {
            "raw scan": lambda path=path, columns=columns: raw_scan(path, columns, verify=False),
            "raw scan, checksums": lambda path=path, columns=columns: raw_scan(path, columns, verify=True),
        }
        for ids in ("index", "hash"):
            for shuffle in (False, True):
                order = "shuffled" if shuffle else "file order"
                chosen = loader(mt26.recipe(path, ids=ids, shuffle=shuffle, workers=0))
                work[f"batches, {ids}, {order}"] = lambda chosen=chosen: exhaust(chosen.batches())
        best = dict.fromkeys(work, float("inf"))
        for _ in range(REPEATS):
            for name, run in work.items():
                best[name] = min(best[name], seconds(run))
        rates = {name: mt26.ROWS / taken for name, taken in best.items()}
        rates["to_pylist"] = PYLIST_ROWS / min(seconds(lambda path=path, columns=columns: pylist_scan(path, columns)) for _ in range(2))
        results += [
            {"file": compression, "what": name, "rows_per_second": rate, "of_raw_scan": rate / rates["raw scan"],
             "of_checked_scan": rate / rates["raw scan, checksums"], "of_pylist": rate / rates["to_pylist"]}
            for name, rate in rates.items()
        ]  # fmt: skip
    return results


def training_ratio(folder: Path) -> dict[str, float]:
    """Steps a second of training that reads, over training on the same batches in memory; medians of rounds that alternate."""
    recipe = mt26.recipe(folder / "zstd.parquet")
    rates: dict[str, list[float]] = {"reading": [], "in memory": []}
    with process_group() as ranks:
        built = build(recipe, ranks)
        source = loader(recipe)
        cached = list(source.batches(steps=TRAINED_STEPS))

        def train(batches: Iterable[Any]) -> None:
            pipeline = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device)
            iterator = iter(batches)
            for _ in range(TRAINED_STEPS):
                pipeline.progress(iterator)

        train(cached)
        for _ in range(ROUNDS):
            # An epoch's first batches wait for the row groups to be opened; a run that goes on does not.
            read = source.batches()
            next(read)
            rates["reading"].append(TRAINED_STEPS / seconds(lambda read=read: train(read)))
            read.close()
            rates["in memory"].append(TRAINED_STEPS / seconds(lambda: train(cached)))
    medians = {name: sorted(values)[ROUNDS // 2] for name, values in rates.items()}
    rows = {f"{name}, rows a second": medians[name] * recipe.data.batch_size for name in medians}
    return rows | {"ratio": medians["reading"] / medians["in memory"]}


def write_giant(path: Path, gigabytes: float) -> int:
    """One row group of about that size: the same rows again and again, written column by column. Returns the rows."""
    block = mt26.row_group(0)
    plain = path.with_name("block.parquet")
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(block, plain, **options)
    copies = max(1, round(gigabytes * 1e9 / plain.stat().st_size))
    plain.unlink()
    pq.write_table(pa.concat_tables([block] * copies), path, row_group_size=copies * len(block), **options)
    return copies * len(block)


READ_GIANT = """
import json, re, sys, time
from pathlib import Path
from tests.benchmarks import mt26, reading

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

source = reading.loader(mt26.recipe(Path(sys.argv[1]), memory_mb=int(sys.argv[2])))
before, began, rows = peak(), time.perf_counter(), 0
for batch in source.batches():
    rows += int((batch.row_B >= 0).sum())
print(json.dumps({"rows": rows, "seconds": time.perf_counter() - began, "before": before, "peak": peak()}))
"""


def giant_memory(folder: Path, gigabytes: float, memory_mb: int = 512) -> dict[str, float]:
    """Peak memory of a process that reads one giant row group, shuffled, in slices."""
    path = folder / "giant.parquet"
    rows = write_giant(path, gigabytes)
    answer = subprocess.run([sys.executable, "-c", READ_GIANT, str(path), str(memory_mb)], capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["rows"] == rows
    return {"file, GB": path.stat().st_size / 1e9, "data.memory_mb": memory_mb} | {
        "memory before, MB": found["before"] / 1e6,
        "peak memory, MB": found["peak"] / 1e6,
        "seconds": found["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--giant-gb", type=float, default=2.0, help="size of the file of one row group")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for compression in ("zstd", "none"):
            mt26.write(folder / f"{compression}.parquet", compression=compression)
        rates = reading_rates(folder)
        table = Table("file", "what", "rows/s", "of raw scan", "of scan with checksums", "of to_pylist", title="Reading, one thread")
        for row in rates:
            ratios = (f"{row[key]:.2f}" for key in ("of_raw_scan", "of_checked_scan", "of_pylist"))
            table.add_row(row["file"], row["what"], f"{row['rows_per_second']:,.0f}", *ratios)
        console.print(table)
        training = training_ratio(folder)
        console.print("Training, one rank:", {name: round(value, 3) for name, value in training.items()})
        giant = giant_memory(folder, arguments.giant_gb)
        console.print("One giant row group:", {name: round(value, 1) for name, value in giant.items()})
    if arguments.json:
        arguments.json.write_text(json.dumps({"reading": rates, "training": training, "giant": giant}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
