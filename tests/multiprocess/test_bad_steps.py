"""What is not finite reaches no weight: a skipped step leaves no trace, is named with its rows, is counted, and too many end the run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.command import refused, triptych
from tests.ranks import run_on_ranks
from tests.runs import local_values, make_loader, stopped_copy
from tests.small import write_log
from triptych.datasets.batch import Batch
from triptych.datasets.schema import InputError
from triptych.embeddings.sharding import of_table
from triptych.launch.build import Built, build, model_state, optimizer_state, table_state
from triptych.launch.checkpoints.manifest import committed, read_manifest
from triptych.launch.checkpoints.parts import local_parts
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.faults.bad_steps import BadSteps
from triptych.launch.trainer import Trainer

STEPS = 5
ATTENTION = ["features.seen.pooling=attention", "features.seen.positions=true"]
CASES = {f"{sharding} {optimizer}": (sharding, optimizer, []) for sharding in ("table_wise", "row_wise", "data_parallel")
         for optimizer in ("rowwise_adagrad", "adagrad", "sgd")}  # fmt: skip
CASES |= {f"{sharding} attention": (sharding, "adagrad", ATTENTION) for sharding in ("row_wise", "column_wise")}
POISONS = {"label": math.nan, "dense": math.nan, "dense too": math.inf}


def poisoned(batch: Batch, kind: str, row: int) -> Batch:
    """The batch with one row whose losses are not finite."""
    labels_BT, dense_BD, known_BT = batch.labels_BT.clone(), batch.dense_BD.clone(), batch.known_BT.clone()
    part = labels_BT if kind == "label" else dense_BD
    part[row], known_BT[row] = POISONS[kind], True
    return replace(batch, labels_BT=labels_BT, dense_BD=dense_BD, known_BT=known_BT)


def built_for(path: Path, ranks: Ranks, sharding: str, *more: str, initialise: bool = True) -> Built:
    plan = [f"tables.{table}.sharding={sharding}" for table in ("user", "item", "words")]
    # The decay and the bounds would show where a step that is skipped does something.
    return build(load_recipe(path, [*plan, "train.weight_decay=0.1", *more]), ranks, initialise=initialise)


def held(built: Built) -> dict[str, Any]:
    return local_values(model_state(built) | optimizer_state(built))


def train_with_and_without(ranks: Ranks, path: Path, kind: str, bad_steps: list[int]) -> dict[str, Any]:
    """For each case: the state after training on batches of which some are poisoned on the last rank, and without those batches."""
    results: dict[str, Any] = {}
    for case, (sharding, optimizer, more) in CASES.items():
        for skips in (False, True):
            built = built_for(path, ranks, sharding, f"train.embedding_optimizer={optimizer}", "train.embedding_clip_norm=1.0", *more)
            batches = list(make_loader(load_recipe(path), ranks.rank, ranks.world_size).batches(steps=STEPS))
            is_last = ranks.rank == ranks.world_size - 1
            if skips:
                batches = [batch for step, batch in enumerate(batches) if step not in bad_steps]
            elif is_last:
                batches = [poisoned(batch, kind, 7) if step in bad_steps else batch for step, batch in enumerate(batches)]
            pipeline = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device)
            reports, feed = [], iter(batches)
            for step, batch in enumerate(batches):
                report = pipeline.progress(feed)
                blamed = None if report.bad_B is None else report.row_B[report.bad_B].tolist()
                reports.append((bool(report.bad_losses), blamed))
                if not skips:
                    bad = step in bad_steps
                    assert reports[-1] == (bad, ([int(batch.row_B[7])] if is_last else []) if bad else None), (case, step, reports[-1])
                assert built.optimizers.gradients_finite
            results[case, skips] = held(built)
    return results


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.mark.parametrize(
    ("world_size", "kind", "bad_steps"),
    [
        (2, "label", [2]),
        (1, "dense", [1, 3]),
        (2, "dense too", [0]),
        pytest.param(2, "dense", [0, 1, 4], marks=pytest.mark.long),
        pytest.param(1, "label", [0], marks=pytest.mark.long),
        pytest.param(3, "label", [1, 2], marks=pytest.mark.long),
    ],
)
def test_a_skipped_step_is_as_if_its_batch_had_never_been(log: Path, world_size: int, kind: str, bad_steps: list[int]) -> None:
    for results in run_on_ranks(world_size, train_with_and_without, log, kind, bad_steps):
        for case in CASES:
            found, expected = results[case, False], results[case, True]
            assert found.keys() == expected.keys() and any("optimizer/" in name for name in found)
            for name, parts in expected.items():
                for (_, tensor), (_, expected_tensor) in zip(found[name], parts, strict=True):
                    assert torch.equal(tensor, expected_tensor) and torch.isfinite(tensor.float()).all(), (case, name)


def look_up_infinity(ranks: Ranks, path: Path, sharding: str) -> dict[str, Any]:
    """One step with a table's row at infinity: who is blamed, and whether anything changed."""
    built = built_for(path, ranks, sharding)
    batch = next(iter(make_loader(load_recipe(path), ranks.rank, ranks.world_size).batches()))
    row = 5
    for name, value in table_state(built).items():
        for part in local_parts(value) if of_table(name) == "item" else ():
            place = row - part.offsets[0]
            if 0 <= place < len(part.tensor):
                part.tensor[place] = math.inf
    before = held(built)
    report = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device).progress(iter([batch]))
    after = held(built)
    unchanged = all(torch.equal(x, y) for name in before for (_, x), (_, y) in zip(before[name], after[name], strict=True))
    ids = [batch.ids[name].to_dense() for name in ("item", "seen")]
    expected = [int(number) for number, *of_row in zip(batch.row_B, *ids, strict=True) if any((part == row).any() for part in of_row)]
    return {"unchanged": unchanged, "losses": report.bad_losses, "blamed": report.row_B[report.bad_B].tolist(), "expected": expected}


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_rows_that_look_up_infinity_are_blamed(log: Path, sharding: str) -> None:
    results = run_on_ranks(2, look_up_infinity, log, sharding)
    assert sum(len(result["expected"]) for result in results) > 3
    for result in results:
        assert result["unchanged"] and set(result["losses"]) == {"ctr", "cvr", "dwell", "retrieval"}
        assert result["blamed"] == result["expected"]


def first_layers(built: Built) -> Iterator[torch.Tensor]:
    """The weights that the tower's inputs meet first, [inputs, anything]; a table's vectors come first, the dense column last."""
    for level in built.task.model.tower.sharing.levels[:1]:
        for part in (level.experts, level.gates):
            weight_GIO = (part.linears[0] if hasattr(part, "linears") else part.linear).weight_GIO
            yield weight_GIO.data.transpose(0, 1)
    for encoder in built.task.model.tower.encoders.values():
        yield encoder.layers[0].weight.data.t()


def gradient_overflows(ranks: Ranks, path: Path, sharding: str) -> dict[str, Any]:
    """Losses that are finite: gradients of vectors that are not, then one of dense weights that is not."""
    loader = make_loader(load_recipe(path), ranks.rank, ranks.world_size)
    batch = next(iter(loader.batches()))
    found: dict[str, Any] = {}
    # Vectors are 0, what they are multiplied with is the largest number there is: 0 ahead, infinity back.
    built = built_for(path, ranks, sharding, initialise=False)
    next(first_layers(built))[:-1] = 3e38
    before = held(built)
    report = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device).progress(iter([batch]))
    assert not report.bad_losses and built.optimizers.gradients_finite
    found["counted"] = BadSteps(10, [], built, ranks).state()
    found["vectors"] = (before, held(built), int(built.task.model.lookup.guard.zeroed), built.task.model.lookup.guard.bad_rows())
    # A dense value is the largest there is on one rank, and what it is multiplied with is 0.
    for largest in (False, True):
        built = built_for(path, ranks, sharding)
        for weight in first_layers(built):
            weight[-1] = 0
        if largest and ranks.rank == 0:
            batch.dense_BD[3] = 3e38
        before = held(built)
        report = TrainPipelineSparseDist(built.model, built.optimizers, ranks.device).progress(iter([batch]))
        assert not report.bad_losses and built.optimizers.gradients_finite == (not largest)
        found["dense", largest] = (before, held(built))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            BadSteps(10, loader.slices, built, ranks).after_step(1, report)
        found["said", largest] = said.getvalue()
    return found


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_a_gradient_that_is_not_finite_reaches_nothing_though_the_losses_are(log: Path, sharding: str) -> None:
    results = run_on_ranks(2, gradient_overflows, log, sharding)
    assert [found["said", False] + found["said", True] for found in results[1:]] == [""] and results[0]["said", False] == ""
    message = re.escape(f"step 1: the losses are finite, but not their gradient, in 128 rows ({log.parent / 'train.parquet'}: row group ")
    assert re.fullmatch(message + r".*; and 125 more\); dense weights kept; bad step 1 of at most 10\n", results[0]["said", True])
    for found in results:
        before, after, zeroed, bad_rows = found["vectors"]
        assert found["counted"] == {"bad_steps": 0, "zeroed_gradients": sum(result["vectors"][2] for result in results)}
        assert zeroed > 64 and bad_rows.all()
        for name, parts in after.items():
            for (_, tensor), (_, old) in zip(parts, before[name], strict=True) if name in before else ():
                assert torch.isfinite(tensor.float()).all(), name
                assert not of_table(name) or torch.equal(tensor, old), name
        (_, expected), (before, after) = found["dense", False], found["dense", True]
        moved = 0
        for name, parts in before.items():
            for (_, old), (_, new), (_, healthy) in zip(parts, after[name], expected[name], strict=True):
                # Tables learn as if the dense value were another, as it is multiplied with 0; all else stays.
                assert torch.equal(new, healthy if of_table(name) or "smearing" in name else old), name
                moved += of_table(name) is not None and not torch.equal(new, old)
        assert moved and all(name in before for name in after)


def log_of_two_files(root: Path) -> Path:
    """Files of 300 and 400 rows, in row groups of 150."""
    path = write_log(root)
    table = pq.read_table(root / "train.parquet")
    for name, start, count in (("train_a", 0, 300), ("train_b", 300, 400)):
        pq.write_table(table.slice(start, count), root / f"{name}.parquet", row_group_size=150)
    (root / "train.parquet").unlink()
    return path


class PoisonedTrainer(Trainer):
    """Some rows of the training split have labels that are not finite, on whichever rank they are. No decoder lets such rows through."""

    def __init__(self, *args: Any, rows: list[int], **options: Any) -> None:
        super().__init__(*args, **options)
        read = self.loader.batches

        def batches(*where: Any) -> Iterator[Batch]:
            for batch in read(*where):
                for row in torch.nonzero(torch.isin(batch.row_B, torch.tensor(rows))).flatten().tolist():
                    batch = poisoned(batch, "label", row)
                yield batch

        self.loader.batches = batches  # type: ignore[method-assign]


class Job(NamedTuple):
    """One training, by all ranks."""

    run: Path
    rows: list[int]
    more: list[str]
    resume: bool = False


def train_poisoned(ranks: Ranks, path: Path, jobs: list[Job]) -> list[tuple[str, str]]:
    """For each job: what the rank said, and with which error it ended."""
    ends = []
    for job in jobs:
        few = ["checkpoint.every_steps=1", "checkpoint.keep=1000", "train.log_every=1"]
        recipe = load_recipe(path, ["data.train=train_*.parquet", "data.shuffle=false", *few, *job.more])
        said, message = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(said):
                PoisonedTrainer(recipe, job.run, ranks, resume=job.resume, rows=job.rows).fit()
        except InputError as error:
            message = str(error)
        ends.append((said.getvalue(), message))
    return ends


def records(run: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_bad_steps_are_said_counted_kept_over_resumes_and_limited(tmp_path: Path) -> None:
    path, run = log_of_two_files(tmp_path / "log"), tmp_path / "run"
    a, b = tmp_path / "log" / "train_a.parquet", tmp_path / "log" / "train_b.parquet"
    # Two ranks of 64 rows, in file order: these are in steps 2 and 4 of 6.
    rows = [167, 170, 171, 172, 420]
    jobs = [Job(run, rows, ["train.max_bad_steps=2"]), Job(tmp_path / "none", [0], ["train.max_bad_steps=0"])]
    first, second = run_on_ranks(2, train_poisoned, path, jobs)

    assert first[0][1] == "" and "bad step" not in second[0][0]
    assert [line for line in first[0][0].splitlines() if "bad step" in line] == [
        f"step 2: the loss of ctr, cvr, dwell, retrieval is not finite, in 4 rows ({a}: row group 1, row 17; {a}: row group 1, row 20;"
        f" {a}: row group 1, row 21; and 1 more); skipped; bad step 1 of at most 2",
        f"step 4: the loss of ctr, cvr, dwell, retrieval is not finite, in 1 row ({b}: row group 0, row 120); skipped;"
        " bad step 2 of at most 2",
    ]
    assert "2 steps with a loss or gradient that was not finite" in first[0][0]
    of_training = [record for record in records(run) if "loss" in record]
    assert [record["bad_steps"] for record in of_training] == [0, 1, 1, 2, 2, 2]
    assert [None in record["loss"].values() for record in of_training] == [False, True, False, True, False, False]
    data = json.loads((run / "result.json").read_text())["data"]
    assert data["bad_steps"] == 2 and data["zeroed_gradients"] == 0
    assert [read_manifest(folder)["bad_steps"]["bad_steps"] for folder in committed(run / "checkpoints")] == [0, 1, 1, 2, 2, 2]
    for _, message in (first[1], second[1]):
        assert message.startswith(f"step 1: the loss of ctr, cvr, dwell, retrieval is not finite, in 1 row ({a}: row group 0, row 0);")

    stopped = stopped_copy(run, 3)
    shutil.copytree(stopped, tmp_path / "again")
    jobs = [Job(stopped, rows, ["train.max_bad_steps=1"], resume=True), Job(tmp_path / "again", rows, [], resume=True)]
    for ends in run_on_ranks(2, train_poisoned, path, jobs):
        assert ends[0][1] == (
            f"step 4: the loss of ctr, cvr, dwell, retrieval is not finite, in 1 row ({b}: row group 0, row 120); this is bad step 2 of"
            " the run, and train.max_bad_steps = 1; lower train.lr and train.embedding_lr, set train.clip_norm and"
            " train.embedding_clip_norm, check these rows, or raise train.max_bad_steps; then go on with --resume"
        )
    assert json.loads((tmp_path / "again" / "result.json").read_text())["data"] == data


def test_a_run_that_diverges_ends_with_one_line(tmp_path: Path) -> None:
    """Nothing is poisoned here: the learning rate is."""
    path = write_log(tmp_path / "log")
    done = triptych(
        "train", "--recipe", path, "--run", tmp_path / "run", "--ranks", 2, "--set", "train.lr=1e30", "--set", "train.max_bad_steps=1"
    )
    message = refused(done)
    assert "; this is bad step 2 of the run, and train.max_bad_steps = 1; lower train.lr" in message
    assert f"({tmp_path / 'log' / 'train.parquet'}: row group " in message and " more)" in message
