"""Predictions of all ranks in input row order, and the report that compares them with the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from ..datasets.batch import Batch
from ..datasets.fitted import Fitted
from ..datasets.fitting import unfitted_decoder
from ..datasets.ids import string_codes
from ..datasets.loader import Loader
from ..datasets.parquet.decode import Decoder, Labels, label_columns, plain_column
from ..datasets.parquet.files import SliceReader, may_skip, read_slices
from ..datasets.parquet.layout import ColumnTypes, is_moment, is_text
from ..datasets.parquet.listing import Listing, list_slices
from ..datasets.row_groups import Slice
from ..datasets.schema import Feature, InputError, Schema
from ..datasets.storage.access import find_files, is_there
from ..mmoe.heads import Task
from ..mmoe.metrics import TaskColumns, report
from .build import Built
from .config import Recipe
from .distributed import Ranks
from .faults.stages import stage

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


def check_data(recipe: Recipe, *, rows: bool = True) -> None:
    """The files a training run reads are there, have the columns the recipe names, and agree on their types.

    Args:
        rows: read all of `valid` and the ids of `items` too: their turn comes late, after an epoch or at the export.
    Raises:
        InputError: names the file and the column.
    """
    schema, data, types = recipe.data_schema, recipe.data, ColumnTypes()
    if data.train is None:
        raise InputError("the recipe has no data.train")
    list_slices(schema, split_files(schema, data.train), labels=True, types=types)
    if data.valid:
        valid = list_slices(schema, split_files(schema, data.valid), labels=True, types=types)
        if rows:
            _check_rows(schema, valid)
    if data.items and recipe.retrieval:
        others = [f.name for f in schema.features if f.side != "item"]
        items = list_slices(schema, split_files(schema, data.items), labels=False, skip_features=others, types=types)
        if rows and data.on_bad_file == "fail":
            _check_catalogue(schema, items, schema.feature(recipe.retrieval.item))


def _check_rows(schema: Schema, valid: Listing) -> None:
    """All rows can be decoded, or some where bad ones are skipped."""
    decoder, reasons = unfitted_decoder(schema), []
    reader = SliceReader(decoder.columns)
    for part in valid.slices:
        stage(f"checking {part}")
        try:
            decoder.decode(reader.read(part), str(part), part.first_row)
        except InputError as error:
            if not may_skip(schema, error):
                raise
            reasons.append(str(error))
    if len(reasons) == len(valid.slices):
        raise InputError(f"no row of data.valid can be read; first: {reasons[0]}")


def _check_catalogue(schema: Schema, items: Listing, item: Feature) -> None:
    for part, table in read_slices(schema, items.slices, [item.column]):
        stage(f"reading {part}")
        nulls = table.column(item.column).null_count
        if nulls:
            raise InputError(f"{part}: column '{item.column}' has {nulls} nulls; every item of the catalogue needs an id")


def entity_loader(decoder: Decoder, slices: Sequence[Slice], ranks: Ranks) -> Loader:
    """Rows in any order, each once: every rank reads row groups of its own."""
    return Loader(decoder, slices, rank=ranks.rank, world_size=ranks.world_size, window=ranks.world_size)


@torch.no_grad()
def run_rows(
    compute: Callable[[Batch], torch.Tensor], built: Built, loader: Loader, progress: Progress = no_progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run every batch of a loader through `compute`, which is given it as the model takes it. Collective.

    Returns:
        This rank's row numbers int64 [R] and results [R, K], on the CPU, padded rows (-1) included: R is the same on all ranks.
    """
    rows, results = [], []
    total = -(-loader.num_rows // loader.global_batch_size)
    for step, batch in enumerate(loader.batches(), 1):
        batch = built.found(batch).to(built.device)
        results.append(compute(batch).float().cpu())
        rows.append(batch.row_B.cpu())
        progress(step, total)
    return torch.cat(rows), torch.cat(results)


class Predictions(NamedTuple):
    """Of the N rows of a split, in input row order. Those of a task with `given` are conditional on it."""

    prediction_NT: np.ndarray
    """float32; NaN where a row could not be read."""
    is_read_N: np.ndarray
    """bool; all true unless `on_bad_file` is "skip"."""


def predict_rows(built: Built, loader: Loader, ranks: Ranks, progress: Progress = no_progress) -> Predictions | None:
    """The predictions on the first rank, None on the others. Collective."""
    model, training = built.model, built.model.training
    model.eval()
    rows_R, predictions_RT = run_rows(lambda batch: model(batch)[1], built, loader, progress)
    model.train(training)
    gathered: list[torch.Tensor] | None = [torch.empty_like(rows_R) for _ in range(ranks.world_size)] if ranks.is_first else None
    predictions = [torch.empty_like(predictions_RT) for _ in range(ranks.world_size)] if ranks.is_first else None
    dist.gather(rows_R, gathered)
    dist.gather(predictions_RT, predictions)
    if gathered is None or predictions is None:
        return None
    row_N, prediction_NT = torch.cat(gathered), torch.cat(predictions)
    real = row_N >= 0
    in_order_NT = torch.full((loader.num_rows, prediction_NT.shape[1]), torch.nan)
    in_order_NT[row_N[real]] = prediction_NT[real]
    is_read_N = torch.zeros(loader.num_rows, dtype=torch.bool)
    is_read_N[row_N[real]] = True
    return Predictions(in_order_NT.numpy(), is_read_N.numpy())


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


class _Truth:
    """What predictions are compared with, for the rows that could be read."""

    def __init__(self, schema: Schema, slices: Sequence[Slice], is_read_N: np.ndarray) -> None:
        data = schema.data
        names = label_columns(schema) + [column for column in (data.group, data.scenario) if column is not None]
        rows, labels, codes, scenarios = [], [], [], []
        for part, table in read_slices(schema, slices, list(dict.fromkeys(names))):
            stage(f"reading {part}")
            kept = np.flatnonzero(is_read_N[part.first_row : part.first_row + part.rows])
            if len(kept) == 0:
                continue
            table = table if len(kept) == len(table) else table.take(pa.array(kept))
            rows.append(part.first_row + kept)
            labels.append(Labels(table, schema, str(part)))
            if data.group:
                codes.append(group_codes(plain_column(table, data.group)))
            if data.scenario:
                scenarios += plain_column(table, data.scenario).to_pylist()
        if not rows:
            raise InputError("no row of the split could be read")
        self.row_N = np.concatenate(rows)
        self.label_NT = np.concatenate([part.labels_NT for part in labels])
        self.null_NT = np.concatenate([part.null_NT for part in labels])
        self.weight_N = np.concatenate([part.weight_N for part in labels]) if data.weight else None
        self.group_N = np.concatenate(codes) if data.group else None
        self.scenario_N = np.asarray(scenarios, dtype=object) if data.scenario else None


def evaluate_rows(predictions: Predictions, slices: Sequence[Slice], schema: Schema, tasks: Sequence[Task]) -> dict[str, Any]:
    """Compare predictions with the files' labels: `rows`, `tasks` and `scenarios` as in result.json."""
    stage("comparing predictions with labels")
    truth, prediction_NT = _Truth(schema, slices, predictions.is_read_N), predictions.prediction_NT
    columns = [
        TaskColumns(
            task.name, task.kind, task.given, prediction_NT[truth.row_N, t].astype(np.float64), truth.label_NT[:, t], truth.null_NT[:, t]
        )
        for t, task in enumerate(tasks)
    ]
    metrics = report(columns, group_N=truth.group_N, scenario_N=truth.scenario_N, weight_N=truth.weight_N)
    return {"rows": len(truth.row_N), **metrics}


class Split:
    """Files with labels, checked against the recipe, ready to be evaluated again and again.

    Args:
        data: the files, or a recipe's key that names them.
    Raises:
        InputError: no files, no rows, or columns that do not fit.
    """

    def __init__(self, name: str, schema: Schema, tasks: Sequence[Task], data: str | list[str], ranks: Ranks, fitted: Fitted) -> None:
        self.name, self.schema, self.tasks, self.ranks = name, schema, tasks, ranks
        paths = split_files(schema, data) if isinstance(data, str) else data
        listing = ranks.from_first(lambda: list_slices(schema, paths, labels=True, types=fitted.types.copy()))
        self.slices = listing.slices
        self.loader = entity_loader(Decoder(schema, fitted), self.slices, ranks)
        self.loader.tally.bad_files |= listing.bad_files

    def evaluate(self, built: Built, step: int, progress: Progress = no_progress) -> dict[str, Any] | None:
        """The report on the first rank, None on the others. Collective."""
        predictions = predict_rows(built, self.loader, self.ranks, progress)
        for tally in self.ranks.gather(self.loader.tally):
            self.loader.tally.update(tally)
        if predictions is None:
            return None
        try:
            metrics = evaluate_rows(predictions, self.slices, self.schema, self.tasks)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise FloatingPointError(f"{self.name}: {error}") from error
        return {"split": self.name, "step": step, "skipped": self.loader.tally.report()["skipped"], **metrics}
