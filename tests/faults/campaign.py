"""A campaign of kills: start a run with torchrun until it is done, and compare what it made with the dataset and an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from tests.faults.kills import CARRIED_OUT, Kill
from tests.faults.rank import LAUNCH
from triptych.launch.checkpoints.manifest import committed, read_manifest, step_of
from triptych.launch.console import FAILURE_FILE

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 540
SECONDS_TO_DIE = 20
"""Until all ranks must be gone once torchrun is."""
RUN_TO_RUN = ("rows_per_second",)
"""Keys of metrics.jsonl that say how fast it went."""


class Attempt(NamedTuple):
    """What the ranks of one start wrote into their ledgers."""

    name: str
    begin: int
    """The step of the checkpoint it went on from."""
    rows: list[dict[int, list[int]]]
    """Of each rank, by step."""
    first_step_at: float | None
    """Seconds since the epoch; None if it trained no step."""

    @property
    def last(self) -> int:
        return max([self.begin, *(step for rows in self.rows for step in rows)])


class Done(NamedTuple):
    """A kill that was carried out, and what it cost."""

    kind: str
    repeated_steps: int
    seconds_to_come_back: float
    """Until the next step was trained; nan if none was left to train."""


@dataclass
class Campaign:
    """One run that is killed by a plan.

    Args:
        folder: of the run and of what the ranks write down.
        recipe: path.
        undisturbed: the run folder to compare with, trained by the first ranks of the campaign unless it is done.
        world_sizes: ranks of each start of torchrun; the last is for all further ones.
        restarts: whether torchrun starts killed ranks again, or is started again itself.
    """

    folder: Path
    recipe: Path
    overrides: list[str]
    kills: Sequence[Kill]
    undisturbed: Path
    world_sizes: Sequence[int] = (2,)
    restarts: bool = True
    global_batch: int = 60
    launches: int = field(default=0)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def carried_out(self) -> list[dict[str, Any]]:
        path = self.folder / CARRIED_OUT
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def train(self) -> None:
        """Start torchrun until the run is done. A start that ends before must have had its kill."""
        self.folder.mkdir(parents=True)
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        (self.folder / "campaign.json").write_text(json.dumps(facts))
        while True:
            kills_before = len(self.carried_out())
            code, log = self._launch(len(self.kills) - kills_before)
            self._wait_for_death()
            if (self.run / "result.json").exists():
                assert code == 0, log
                return
            assert len(self.carried_out()) > kills_before, f"torchrun ended with {code} without a kill\n{log}"

    def _launch(self, kills_left: int) -> tuple[int, str]:
        ranks = self.world_sizes[min(self.launches, len(self.world_sizes) - 1)]
        restarts = kills_left if self.restarts else 0
        log = self.folder / f"launch.{self.launches:02d}.log"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", LAUNCH: str(self.launches)}
        # As `triptych train` sets it: where a rank says why it ended, and learns whether another attempt is of use.
        env[FAILURE_FILE] = str(self.folder / f"failure.{self.launches:02d}.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        meeting = ["--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command = [*torchrun, *meeting, "-m", "tests.faults.rank", str(self.folder / "campaign.json")]
        self.launches += 1
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=env)
            try:
                code = process.wait(TIMEOUT_SECONDS)
            finally:
                process.kill()
                process.wait()
        return code, "\n".join(log.read_text().splitlines()[-80:])

    def _wait_for_death(self) -> None:
        """No rank outlives its torchrun, however that ended."""
        deadline = time.monotonic() + SECONDS_TO_DIE
        pids = [int(path.read_text()) for path in self.folder.glob("pid.*")]
        while any(map(_is_alive, pids)):
            assert time.monotonic() < deadline, f"ranks outlive torchrun: {[pid for pid in pids if _is_alive(pid)]}"
            time.sleep(0.05)

    def attempts(self) -> list[Attempt]:
        """In the order of time; without those that were killed before they could train."""
        names = sorted({path.name.rsplit(".", 2)[0] for path in self.folder.glob("ledger.*.jsonl")})
        return [self._attempt(name) for name in names]

    def _attempt(self, name: str) -> Attempt:
        ranks = []
        for path in sorted(self.folder.glob(f"{name}.*.jsonl")):
            # What follows the last line end is half a line that a kill left.
            ranks.append([json.loads(line) for line in path.read_text().split("\n")[:-1]])
        ranks = [lines for lines in ranks if lines]
        begins = {lines[0]["from"] for lines in ranks}
        assert len(begins) == 1, f"{name}: ranks go on from {begins}"
        begin = begins.pop()
        rows = [{line["step"]: line["rows"] for line in lines[1:]} for lines in ranks]
        for its_rows in rows:
            assert list(its_rows) == list(range(begin + 1, begin + 1 + len(its_rows))), f"{name}: from {begin}, trained {list(its_rows)}"
        lengths = [len(its_rows) for its_rows in rows]
        assert max(lengths) - min(lengths) <= 1, f"{name}: ranks trained {lengths} steps"
        first = min((lines[1]["time"] for lines in ranks if len(lines) > 1), default=None)
        return Attempt(name.removeprefix("ledger."), begin, rows, first)

    def check_rows(self) -> None:
        """The steps that the final model is made of hold each row of the dataset once an epoch."""
        attempts = self.attempts()
        made_of: dict[int, Attempt] = {}
        for attempt in attempts:
            for step in range(attempt.begin + 1, attempt.last + 1):
                made_of[step] = attempt
        total = step_of(committed(self.run / "checkpoints")[-1])
        assert sorted(made_of) == list(range(1, total + 1))
        num_rows = pq.read_metadata(self.recipe.parent / "train.parquet").num_rows
        steps_per_epoch = -(-num_rows // self.global_batch)
        assert total % steps_per_epoch == 0
        for first in range(1, total + 1, steps_per_epoch):
            rows = [row for step in range(first, first + steps_per_epoch) for rank in made_of[step].rows for row in rank[step]]
            assert sorted(rows) == list(range(num_rows)), f"epoch from step {first}: {len(rows)} rows trained of {num_rows}"

    def costs(self) -> list[Done]:
        """Of every kill."""
        attempts, found = self.attempts(), []
        for kill in self.carried_out():
            before = [attempt for attempt in attempts if attempt.name <= kill["attempt"]]
            after = [attempt for attempt in attempts if attempt.name > kill["attempt"]]
            reached = max((attempt.last for attempt in before[-1:] if attempt.name == kill["attempt"]), default=0)
            goes_on = next((attempt for attempt in after if attempt.first_step_at is not None), None)
            repeated = max(0, reached - goes_on.begin) if goes_on else 0
            found.append(Done(kill["kind"], repeated, goes_on.first_step_at - kill["time"] if goes_on else float("nan")))
        return found

    def check_folder(self, keep: int, keep_best: int) -> None:
        """Nothing half is left, and no more checkpoints than the recipe asks for."""
        left = [path for ending in ("writing", "deleting", "damaged") for path in self.run.rglob(f"*.{ending}")]
        assert not left, left
        kept = committed(self.run / "checkpoints")
        assert len(kept) <= keep + keep_best, [path.name for path in kept]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def records(run: Path) -> list[dict[str, Any]]:
    """Of every logged step and evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in RUN_TO_RUN} for line in lines if "checkpoint" not in line]


def last_checkpoint(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Its facts, and its whole tensors by name."""
    folder = committed(run / "checkpoints")[-1]
    manifest = read_manifest(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in manifest["tensors"].items():
        tensors[name] = whole = torch.zeros(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
        for part in tensor["parts"]:
            with safe_open(folder / part["file"], framework="pt") as file:
                whole[tuple(slice(o, o + s) for o, s in zip(part["offsets"], part["sizes"], strict=True))] = file.get_tensor(part["key"])
    return {key: value for key, value in manifest.items() if key not in ("files", "tensors", "sha256")}, tensors


def assert_equal_runs(found_run: Path, expected_run: Path) -> None:
    """Equal to the last bit: result, logged losses and metrics, the last checkpoint. A run that was stopped logs that step, too."""
    assert result(found_run) == result(expected_run)
    expected_records = records(expected_run)
    steps = {record["step"] for record in expected_records}
    assert [record for record in records(found_run) if record["step"] in steps] == expected_records
    (facts, found), (expected_facts, expected) = last_checkpoint(found_run), last_checkpoint(expected_run)
    assert facts == expected_facts
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_close_runs(found_run: Path, expected_run: Path, relative: float) -> None:
    """Of different numbers of ranks: ids exactly, weights and optimizers closely."""
    (facts, found), (expected_facts, expected) = last_checkpoint(found_run), last_checkpoint(expected_run)
    assert facts["reading"] == expected_facts["reading"]
    shared = {name for name in expected if not name.startswith("rank_")}
    assert shared == {name for name in found if not name.startswith("rank_")}
    for name in shared:
        if name.startswith("ids/"):
            assert torch.equal(found[name], expected[name]), name
        else:
            error = (found[name].double() - expected[name].double()).norm() / expected[name].double().norm().clamp(min=1e-12)
            assert error < relative, (name, float(error))


def table(done: Sequence[Done]) -> str:
    """By kind of kill, of campaigns whose rows were checked."""
    rows = []
    for kind in sorted({kill.kind for kill in done}):
        of_kind = [kill for kill in done if kill.kind == kind]
        seconds = sorted(kill.seconds_to_come_back for kill in of_kind if kill.seconds_to_come_back == kill.seconds_to_come_back)
        shown = f"{seconds[len(seconds) // 2]:.1f} (most {seconds[-1]:.1f})" if seconds else "nothing to train"
        rows.append(f"| {kind} | {len(of_kind)} | 0 | {sum(kill.repeated_steps for kill in of_kind)} | {shown} |")
    head = ["| kill | number | rows lost | steps repeated | seconds until the next step, median |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])
