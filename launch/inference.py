"""Predictions of all ranks in input row order, and the report that compares them with the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import nn

from ..datasets.batch import Batch
from ..datasets.files import find_files, list_row_groups, read_row_group
from ..datasets.ids import mix, string_codes
from ..datasets.loader import Loader
from ..datasets.parquet import check_columns, label_columns, labels_of, weights_of
from ..datasets.row_groups import RowGroup
from ..datasets.schema import InputError, Schema
from ..mmoe.heads import Task
from ..mmoe.metrics import TaskColumns, report
from .config import Recipe
from .distributed import Ranks

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    pass


def split_files(schema: Schema, data: str | Path) -> list[str]:
    """Files of a split: a path as it is, or one relative to the recipe's root.

    Raises:
        InputError: neither is there.
    """
    return find_files(".", str(data)) if Path(data).exists() else find_files(schema.data.root, str(data))


def check_data(recipe: Recipe) -> None:
    """The files a training run reads are there and have the columns the recipe names.

    Raises:
        InputError: names the file and the column.
    """
    schema, data = recipe.data_schema, recipe.data
    if data.train is None:
        raise InputError("the recipe has no data.train")
    for split in (data.train, data.valid):
        for path in split_files(schema, split) if split else []:
            check_columns(schema, path, labels=True)
    if data.items and recipe.retrieval:
        others = [f.name for f in schema.features if f.side != "item"]
        for path in split_files(schema, data.items):
            check_columns(schema, path, labels=False, skip_features=others)


def entity_loader(schema: Schema, groups: Sequence[RowGroup], ranks: Ranks, skip_features: Sequence[str] = ()) -> Loader:
    """Rows without labels, in any order, each once: every rank reads row groups of its own."""
    return Loader(
        schema, groups, rank=ranks.rank, world_size=ranks.world_size, window=ranks.world_size, labels=False, skip_features=skip_features
    )


@torch.no_grad()
def run_rows(
    compute: Callable[[Batch], torch.Tensor], loader: Loader, ranks: Ranks, progress: Progress = no_progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run every batch of a loader. Collective.

    Returns:
        This rank's row numbers int64 [R] and results [R, K], on the CPU, padded rows (-1) included: R is the same on all ranks.
    """
    rows, results = [], []
    total = -(-loader.num_rows // loader.global_batch_size)
    for step, batch in enumerate(loader.batches(), 1):
        batch = batch.to(ranks.device)
        results.append(compute(batch).float().cpu())
        rows.append(batch.row_B.cpu())
        progress(step, total)
    return torch.cat(rows), torch.cat(results)


def predict_rows(model: nn.Module, loader: Loader, ranks: Ranks, progress: Progress = no_progress) -> np.ndarray | None:
    """Predictions float32 [N, T] in input row order on the first rank, None on the others. Collective.

    Predictions of a task with `given` are conditional on it.
    """
    training = model.training
    model.eval()
    rows_R, predictions_RT = run_rows(lambda batch: model(batch)[1], loader, ranks, progress)
    model.train(training)
    gathered: list[torch.Tensor] | None = [torch.empty_like(rows_R) for _ in range(ranks.world_size)] if ranks.is_first else None
    predictions = [torch.empty_like(predictions_RT) for _ in range(ranks.world_size)] if ranks.is_first else None
    dist.gather(rows_R, gathered)
    dist.gather(predictions_RT, predictions)
    if gathered is None or predictions is None:
        return None
    row_N, prediction_NT = torch.cat(gathered), torch.cat(predictions)
    real = row_N >= 0
    in_order_NT = torch.empty(loader.num_rows, prediction_NT.shape[1])
    in_order_NT[row_N[real]] = prediction_NT[real]
    return in_order_NT.numpy()


def group_codes(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """One int64 a distinct value; equal values have equal codes."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return string_codes(flat.fill_null("")).view(np.int64)
    if pa.types.is_integer(values.type):
        return pc.cast(values.fill_null(-1), pa.int64()).to_numpy()
    return mix(pc.cast(values, pa.float64()).to_numpy().view(np.uint64)).view(np.int64)


def evaluate_rows(prediction_NT: np.ndarray, groups: Sequence[RowGroup], schema: Schema, tasks: Sequence[Task]) -> dict[str, Any]:
    """Compare predictions with the files' labels: `tasks` and `scenarios` as in result.json."""
    extra = [column for column in (schema.data.group, schema.data.scenario) if column is not None]
    tables, labels, weights = [], [], []
    for group in groups:
        table, where = read_row_group(group, list(dict.fromkeys(label_columns(schema) + extra)))
        labels.append(labels_of(table, schema, where)[0])
        weights.append(weights_of(table, schema, where))
        tables.append(table.select(extra))
    label_NT, table = np.concatenate(labels), pa.concat_tables(tables)
    columns = [
        TaskColumns(task.name, task.kind, task.given, prediction_NT[:, t].astype(np.float64), label_NT[:, t])
        for t, task in enumerate(tasks)
    ]
    return report(
        columns,
        group_N=group_codes(table.column(schema.data.group)) if schema.data.group else None,
        scenario_N=np.asarray(table.column(schema.data.scenario).to_pylist(), dtype=object) if schema.data.scenario else None,
        weight_N=np.concatenate(weights) if schema.data.weight else None,
    )


class Split:
    """Files with labels, checked against the recipe, ready to be evaluated again and again.

    Raises:
        InputError: no files, no rows, or columns that do not fit.
    """

    def __init__(self, name: str, schema: Schema, tasks: Sequence[Task], data: str | Path, ranks: Ranks) -> None:
        self.name, self.schema, self.tasks, self.ranks = name, schema, tasks, ranks
        files = split_files(schema, data)
        for path in files:
            check_columns(schema, path, labels=True)
        self.groups = list_row_groups(files)
        self.loader = entity_loader(schema, self.groups, ranks)

    def evaluate(self, model: nn.Module, step: int, progress: Progress = no_progress) -> dict[str, Any] | None:
        """The report on the first rank, None on the others. Collective."""
        prediction_NT = predict_rows(model, self.loader, self.ranks, progress)
        if prediction_NT is None:
            return None
        try:
            metrics = evaluate_rows(prediction_NT, self.groups, self.schema, self.tasks)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise FloatingPointError(f"{self.name}: {error}") from error
        return {"split": self.name, "rows": self.loader.num_rows, "step": step, **metrics}
