"""Damaged files through the command line: named and refused, or left out and counted, in training, resuming, prediction and evaluation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import succeeds, triptych
from tests.small import RECIPE, rows
from triptych.datasets.parquet.listing import list_slices
from triptych.launch import cli
from triptych.launch.config import load_recipe
from triptych.launch.distributed import process_group
from triptych.launch.inference import Predictions, evaluate_rows
from triptych.launch.run_folder import read_recipe
from triptych.launch.trainer import Trainer

GROUP_ROWS = 150
SKIP = "data.on_bad_file=skip"


def log_rows(count: int, seed: int) -> pa.Table:
    columns = rows(count, seed)
    return pa.table(columns | {"w": np.ones(count), "dwell_ms": np.minimum(columns["dwell_ms"], 60_000)})


def write(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return path


def flip_a_bit(path: Path, row_group: int) -> None:
    """In the last page of one column of one row group."""
    group = pq.read_metadata(path).row_group(row_group)
    column = next(group.column(index) for index in range(group.num_columns) if group.column(index).path_in_schema == "item")
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 16
    path.write_bytes(content)


def with_odd_dwell(table: pa.Table) -> pa.Table:
    """Of the clicked rows, the first has a negative dwell time and the next two are above the cap, as no others are."""
    dwell = table.column("dwell_ms").to_numpy().copy()
    dwell[np.flatnonzero(table.column("click").to_numpy())[:3]] = [-1, 10**12, 60_001]
    return table.set_column(table.column_names.index("dwell_ms"), "dwell_ms", pa.array(dwell))


def with_weight(table: pa.Table, weight_N: np.ndarray) -> pa.Table:
    return table.set_column(table.column_names.index("w"), "w", pa.array(weight_N))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose train files are: sound, with a flipped bit in the second of two row groups, cut off, without a column."""
    root = tmp_path_factory.mktemp("log")
    write(root / "train" / "a.parquet", with_odd_dwell(log_rows(300, 0)))
    flipped = write(root / "train" / "b.parquet", log_rows(300, 1))
    flip_a_bit(flipped, 1)
    cut_off = write(root / "train" / "c.parquet", log_rows(300, 2))
    cut_off.write_bytes(cut_off.read_bytes()[:-100])
    write(root / "train" / "d.parquet", log_rows(300, 3).drop_columns(["length"]))
    write(root / "valid.parquet", log_rows(200, 4))
    recipe = RECIPE.replace("{root}", str(root)).replace('"train.parquet"', '"train"').replace("[data]\n", '[data]\nweight = "w"\n', 1)
    (root / "recipe.toml").write_text(recipe, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def run(log: Path) -> tuple[Path, str]:
    """A run on the readable rows, and what it said."""
    run = log / "run"
    return run, succeeds("train", "--recipe", log / "recipe.toml", "--run", run, "--ranks", 2, "--set", SKIP)


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def check_counts(result: dict[str, Any], log: Path) -> None:
    data = result["data"]
    assert data["rows"] == 600  # of the files that could be opened and have all columns
    assert (data["skipped"]["rows"], data["skipped"]["files"]) == (GROUP_ROWS, 3)
    reasons = sorted(data["skipped"]["reasons"])
    train = log / "train"
    assert len(reasons) == 3 and all("\n" not in reason for reason in reasons)
    assert reasons[0].startswith(f"{train}/b.parquet: row group 1 cannot be read (") and "CRC" in reasons[0]
    assert reasons[1].startswith(f"{train}/c.parquet: not a readable parquet file")
    assert reasons[2].startswith(f"{train}/d.parquet: no column 'length' for feature 'length'")
    assert data["capped"] == {"dwell": {"negative": 1, "above_cap": 2}}


def numbers(metrics: Any) -> list[float]:
    if isinstance(metrics, dict):
        return [number for key in sorted(metrics) for number in numbers(metrics[key])]
    return [metrics] if isinstance(metrics, int | float) else []


def test_training_leaves_out_what_is_bad_and_counts_it(log: Path, run: tuple[Path, str]) -> None:
    folder, said = run
    result = result_of(folder)
    check_counts(result, log)
    assert result["rows"] == 200 and result["step"] == math.ceil(600 / 128)
    assert len(numbers(result["tasks"])) > 6 and all(map(math.isfinite, numbers(result["tasks"])))
    assert "skipped 150 training rows in 3 files" in said
    assert "dwell: 1 negative durations set to 0, 2 cut to the cap" in said
    for name in ("b.parquet: row group 1", "c.parquet", "d.parquet"):
        assert f"{log}/train/{name}" in said, said


def train_here(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """Train on one rank, in this process; returns the result."""
    with process_group() as ranks:
        Trainer(load_recipe(str(recipe), list(overrides)), run, ranks, resume=resume).fit()
    return result_of(run)


def test_the_rest_is_trained_once(log: Path, run: tuple[Path, str]) -> None:
    """It is the same training as one, on one rank, in which the bad rows weigh nothing."""
    files = log / "weightless"
    weight_N = np.where(np.arange(300) < GROUP_ROWS, 1.0, 0.0)
    write(files / "a.parquet", with_odd_dwell(log_rows(300, 0)))
    write(files / "b.parquet", with_weight(log_rows(300, 1), weight_N))
    expected = train_here(log / "recipe.toml", log / "other", f"data.train={files}", "data.batch_size=128")
    assert expected["data"]["skipped"] == {"rows": 0, "files": 0, "reasons": []}
    np.testing.assert_allclose(numbers(result_of(run[0])["tasks"]), numbers(expected["tasks"]), rtol=1e-5)


def test_a_resumed_run_keeps_its_counts(log: Path, run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its second epoch it meets the same rows again, in files that are elsewhere by then."""
    shutil.copytree(log / "train", tmp_path / "train")
    shutil.copy(log / "valid.parquet", tmp_path)
    result = train_here(run[0] / "recipe.toml", run[0], "train.epochs=2", f"data.root={tmp_path}", resume=True)
    assert f"resumed from {run[0]}" in capsys.readouterr().out
    check_counts(result, tmp_path)


def test_a_file_that_is_none_is_refused_before_anything_starts(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--recipe", str(log / "recipe.toml"), "--run", str(tmp_path / "run")])
    line = capsys.readouterr().err
    assert exit_.value.code == 2 and line.count("\n") == 1 and f"{log}/train/c.parquet: not a readable parquet file" in line, line
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_stops_training_in_one_line(log: Path, tmp_path: Path) -> None:
    done = triptych("train", "--recipe", log / "recipe.toml", "--run", tmp_path / "run", "--set", "data.train=train/[ab].parquet")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and f"{log}/train/b.parquet: row group 1 cannot be read" in done.stderr, done.stderr


def test_predictions_and_metrics_of_what_can_be_read(log: Path, run: tuple[Path, str], tmp_path: Path) -> None:
    part = log_rows(GROUP_ROWS, 5)
    bad = write(tmp_path / "bad.parquet", pa.concat_tables([part, log_rows(GROUP_ROWS, 6), part]))
    flip_a_bit(bad, 1)
    out = tmp_path / "predictions.parquet"
    assert "150 rows could not be read" in succeeds("predict", "--run", run[0], "--data", bad, "--out", out, "--ranks", 2)
    table = pq.read_table(out)
    assert table.column_names == ["ctr", "cvr", "dwell"] and len(table) == 3 * GROUP_ROWS
    for column in table.columns:
        first, second, third = (column.slice(start, GROUP_ROWS) for start in range(0, 3 * GROUP_ROWS, GROUP_ROWS))
        assert (first.null_count, second.null_count, third.null_count) == (0, GROUP_ROWS, 0)
        np.testing.assert_allclose(first.to_numpy(), third.to_numpy(), rtol=1e-5)
        assert len(set(first.to_pylist())) > GROUP_ROWS / 2
    succeeds("evaluate", "--run", run[0], "--data", bad, "--json", tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    good = write(tmp_path / "good.parquet", pa.concat_tables([part, part]))
    recipe = read_recipe(run[0])
    slices = list_slices(recipe.data_schema, [str(good)], labels=True).slices
    prediction_NT = np.stack([column.drop_null().to_numpy() for column in table.columns], axis=1)
    expected = evaluate_rows(Predictions(prediction_NT, np.ones(len(prediction_NT), bool)), slices, recipe.data_schema, recipe.tasks)
    assert metrics["rows"] == expected["rows"] == 2 * GROUP_ROWS
    np.testing.assert_allclose(numbers(metrics["tasks"]), numbers(expected["tasks"]), rtol=1e-5)
    np.testing.assert_allclose(numbers(metrics["scenarios"]), numbers(expected["scenarios"]), rtol=1e-5)
