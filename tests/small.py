"""A small log and recipe that tests share: two id tables, one shared with a list, dense, three tasks, retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triptych.datasets.columns import Jagged

RECIPE = """
name = "small"
[data]
root = "{root}"
train = "train.parquet"
valid = "valid.parquet"
group = "user"
scenario = "page"
batch_size = 64
[[tables]]
name = "user"
rows = 97
dim = 8
[[tables]]
name = "item"
rows = 60
dim = 16
ids = "index"
[[tables]]
name = "words"
rows = 50
dim = 4
[[features]]
name = "user"
kind = "id"
table = "user"
side = "user"
[[features]]
name = "item"
kind = "id"
table = "item"
side = "item"
[[features]]
name = "seen"
kind = "ids"
table = "item"
side = "user"
max_length = 5
[[features]]
name = "queries"
kind = "ids"
table = "words"
side = "user"
[[features]]
name = "bought"
kind = "ids"
table = "user"
side = "user"
pooling = "sum"
[[features]]
name = "page"
kind = "id"
table = "words"
[[features]]
name = "length"
kind = "dense"
transform = "log1p"
side = "item"
[[tasks]]
name = "ctr"
kind = "binary"
label = "click"
[[tasks]]
name = "cvr"
kind = "binary"
label = "buy"
given = "ctr"
estimator = "esmm"
[[tasks]]
name = "dwell"
kind = "duration"
label = "dwell_ms"
given = "ctr"
scale = 0.001
cap = 60
weight = 0.5
[model]
sharing = "ple"
experts = 2
task_experts = 1
expert_layers = [16, 8]
tower_layers = [8]
[retrieval]
user = "user"
item = "item"
dim = 8
layers = [8]
[train]
epochs = 1
seed = 3
log_every = 2
[checkpoint]
every_steps = 1000
"""


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    """Columns of a small log in which clicks follow user, item and page."""
    rng = np.random.default_rng(seed)
    user, item, page = rng.integers(0, 200, count), rng.integers(0, 60, count), rng.integers(0, 3, count)
    p_click = 1 / (1 + np.exp(-(np.sin(user) + np.cos(item * 1.7) + page - 1)))
    click = (rng.random(count) < p_click).astype(np.int64)
    buy = click * (rng.random(count) < 0.3)
    length = rng.integers(5, 300, count)
    dwell = (click * length * 1000 * rng.random(count)).astype(np.int64)
    seen = [rng.integers(0, 60, n).tolist() for n in rng.integers(0, 8, count)]
    queries = [rng.integers(0, 30, n).tolist() for n in rng.integers(0, 5, count)]
    bought = [rng.integers(0, 200, n).tolist() for n in rng.integers(0, 3, count)]
    names = np.array(["home", "search", "feed"])
    columns = {"user": user, "item": item, "seen": seen, "queries": queries, "bought": bought, "page": names[page], "length": length}
    return columns | {"click": click, "buy": buy, "dwell_ms": dwell, "time_ms": np.arange(count)}


def write_log(root: Path, *, train_rows: int = 700, valid_rows: int = 200, row_group_rows: int = 150) -> Path:
    """Write train, valid and the recipe; returns the recipe's path."""
    root.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train_rows, 0), ("valid", valid_rows, 1)):
        pq.write_table(pa.table(rows(count, seed)), root / f"{name}.parquet", row_group_size=row_group_rows)
    recipe = root / "recipe.toml"
    recipe.write_text(RECIPE.replace("{root}", str(root)), encoding="utf-8")
    return recipe


def as_lists(jagged: Jagged) -> list[list[int]]:
    """The values of each row."""
    ends = np.cumsum(jagged.lengths_N)[:-1]
    return [values.tolist() for values in np.split(jagged.value_M, ends)] if len(jagged) else []
