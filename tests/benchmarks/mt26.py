"""MT-26-mini, the standard work that figures are compared on: 20 one-hot and 6 multi-hot features, 13 dense, three tasks, Zipf ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triptych.launch.config import Recipe

TABLE_ROWS = [1_000_000, 500_000] + [10_000] * 24
NUM_ONE_HOT, NUM_MULTI_HOT, NUM_DENSE = 20, 6, 13
ROWS, ROW_GROUP_ROWS = 400_000, 100_000
ZIPF, MEAN_LENGTH, MAX_LENGTH = 1.05, 10, 50


def _zipf(rng: np.random.Generator, num_values: int, count: int) -> np.ndarray:
    """int64 [count]: value n with probability in proportion to (n + 1) ** -ZIPF."""
    share = np.cumsum(np.arange(1, num_values + 1) ** -ZIPF)
    return np.searchsorted(share / share[-1], rng.random(count)).astype(np.int64)


def row_group(number: int, rows: int = ROW_GROUP_ROWS) -> pa.Table:
    """One row group of the log, a function of its number alone."""
    rng = np.random.default_rng([26, number])
    columns: dict[str, Any] = {f"id_{i}": _zipf(rng, TABLE_ROWS[i], rows) for i in range(NUM_ONE_HOT)}
    for i in range(NUM_MULTI_HOT):
        lengths = np.minimum(rng.geometric(1 / MEAN_LENGTH, rows), MAX_LENGTH)
        values = _zipf(rng, TABLE_ROWS[NUM_ONE_HOT + i], int(lengths.sum()))
        columns[f"ids_{i}"] = pa.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), values)
    columns |= {f"dense_{i}": rng.standard_normal(rows).astype(np.float32) for i in range(NUM_DENSE)}
    click = rng.random(rows) < 0.2
    columns["click"] = click.astype(np.int8)
    columns["buy"] = (click & (rng.random(rows) < 0.2)).astype(np.int8)
    columns["dwell"] = (click * rng.exponential(30, rows)).astype(np.float32)
    return pa.table(columns)


def write(path: Path, *, compression: str = "zstd", rows: int = ROWS) -> None:
    """The log as one file, in row groups of ROW_GROUP_ROWS."""

    def tables() -> Iterator[pa.Table]:
        for number in range(rows // ROW_GROUP_ROWS):
            yield row_group(number)

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    for table in tables():
        writer = writer or pq.ParquetWriter(path, table.schema, compression=compression, write_page_checksum=True)
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    assert writer is not None
    writer.close()


def recipe(path: Path, **data: Any) -> Recipe:
    """The recipe of MT-26-mini on one file; `data` overrides keys of its [data] section."""
    names = [f"id_{i}" for i in range(NUM_ONE_HOT)] + [f"ids_{i}" for i in range(NUM_MULTI_HOT)]
    ids = data.pop("ids", "index")
    features = [
        {"name": name, "kind": "ids" if name.startswith("ids") else "id", "table": name, "side": ("user", "item", "context")[min(i, 2)]}
        for i, name in enumerate(names)
    ]
    return Recipe.model_validate(
        {
            "name": "mt26-mini",
            "data": {"root": str(path.parent.resolve()), "train": path.name, "batch_size": 2048} | data,
            "tables": [{"name": name, "rows": rows, "dim": 16, "ids": ids} for name, rows in zip(names, TABLE_ROWS, strict=True)],
            "features": features + [{"name": f"dense_{i}", "kind": "dense"} for i in range(NUM_DENSE)],
            "tasks": [
                {"name": "ctr", "kind": "binary", "label": "click"},
                {"name": "cvr", "kind": "binary", "label": "buy", "given": "ctr"},
                {"name": "dwell", "kind": "duration", "label": "dwell", "given": "ctr"},
            ],
            "model": {"sharing": "mmoe", "experts": 4, "expert_layers": [128, 64], "tower_layers": [32]},
        }
    )
