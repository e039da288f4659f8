"""Predictions of all ranks in input row order, and the report that compares them with the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import nn

from ..datasets.batch import Batch
from ..datasets.files import find_files, is_there, list_row_groups, read_row_group
from ..datasets.ids import string_codes
from ..datasets.loader import Loader
from ..datasets.parquet import check_columns, is_moment, is_text, label_columns, labels_of, plain_column, weights_of
from ..datasets.row_groups import RowGroup
from ..datasets.schema import Feature, InputError, Schema
from ..mmoe.heads import Task
from ..mmoe.metrics import TaskColumns, report
from .config import Recipe
from .distributed import Ranks

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    pass


def split_files(schema: Schema, data: str) -> list[str]:
    """Files of a recipe's key: relative to the recipe's root, unless absolute.

    Raises:
        InputError: nothing there.
    """
    return find_files(schema.data.root, data)


def given_files(schema: Schema, data: str) -> list[str]:
    """Files of the command line's --data: relative to the working directory, or else to the recipe's root.

    Raises:
        InputError: nothing there.
    """
    return find_files("." if is_there(data) else schema.data.root, data)


def check_data(recipe: Recipe) -> None:
    """The files a training run reads are there and have the columns the recipe names.

    Labels of `valid` and ids of `items` are read too: those files' turn comes late, after an epoch or at the export.

    Raises:
        InputError: names the file and the column.
    """
    schema, data = recipe.data_schema, recipe.data
    if data.train is None:
        raise InputError("the recipe has no data.train")
    for split in (data.train, data.valid):
        for path in split_files(schema, split) if split else []:
            check_columns(schema, path, labels=True)
    if data.valid:
        _check_labels(schema, split_files(schema, data.valid))
    if data.items and recipe.retrieval:
        _check_catalogue(schema, split_files(schema, data.items), schema.feature(recipe.retrieval.item))


def _check_labels(schema: Schema, files: list[str]) -> None:
    for group in list_row_groups(files):
        table, where = read_row_group(group, list(dict.fromkeys(label_columns(schema))))
        labels_of(table, schema, where)
        weights_of(table, schema, where)


def _check_catalogue(schema: Schema, files: list[str], item: Feature) -> None:
    others = [f.name for f in schema.features if f.side != "item"]
    for path in files:
        check_columns(schema, path, labels=False, skip_features=others)
    for group in list_row_groups(files):
        table, where = read_row_group(group, [item.column])
        nulls = table.column(item.column).null_count
        if nulls:
            raise InputError(f"{where}: column '{item.column}' has {nulls} nulls; every item of the catalogue needs an id")


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


# Nulls are a group of their own; a number that no id or hash is likely to be.
_NULL_CODE = -0x1E3779B97F4A7C15


def group_codes(values: pa.Array) -> np.ndarray:
    """int64 [N]: equal codes for equal values, whatever width their column's type has; moments count to the microsecond."""
    if is_text(values.type):
        codes = string_codes(values.fill_null("")).view(np.int64)
    else:
        if is_moment(values.type):
            zone = getattr(values.type, "tz", None)
            values = pc.cast(values, pa.timestamp("us", zone), safe=False)
        wide = pa.uint64() if pa.types.is_uint64(values.type) else pa.int64()
        codes = pc.cast(values, wide).fill_null(0).to_numpy(zero_copy_only=False).view(np.int64)
    return np.where(values.is_null().to_numpy(zero_copy_only=False), _NULL_CODE, codes)


def evaluate_rows(prediction_NT: np.ndarray, groups: Sequence[RowGroup], schema: Schema, tasks: Sequence[Task]) -> dict[str, Any]:
    """Compare predictions with the files' labels: `tasks` and `scenarios` as in result.json."""
    data = schema.data
    names = label_columns(schema) + [column for column in (data.group, data.scenario) if column is not None]
    labels, weights, codes, scenarios = [], [], [], []
    for group in groups:
        table, where = read_row_group(group, list(dict.fromkeys(names)))
        labels.append(labels_of(table, schema, where)[0])
        weights.append(weights_of(table, schema, where))
        if data.group:
            codes.append(group_codes(plain_column(table, data.group)))
        if data.scenario:
            scenarios += plain_column(table, data.scenario).to_pylist()
    label_NT = np.concatenate(labels)
    columns = [
        TaskColumns(task.name, task.kind, task.given, prediction_NT[:, t].astype(np.float64), label_NT[:, t])
        for t, task in enumerate(tasks)
    ]
    return report(
        columns,
        group_N=np.concatenate(codes) if data.group else None,
        scenario_N=np.asarray(scenarios, dtype=object) if data.scenario else None,
        weight_N=np.concatenate(weights) if data.weight else None,
    )


class Split:
    """Files with labels, checked against the recipe, ready to be evaluated again and again.

    Args:
        data: the files, or a recipe's key that names them.
    Raises:
        InputError: no files, no rows, or columns that do not fit.
    """

    def __init__(self, name: str, schema: Schema, tasks: Sequence[Task], data: str | list[str], ranks: Ranks) -> None:
        self.name, self.schema, self.tasks, self.ranks = name, schema, tasks, ranks
        files = split_files(schema, data) if isinstance(data, str) else data
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
