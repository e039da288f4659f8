"""Why a rank ended, for whoever launched it. Of an attempt the first reason counts: others follow from it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from ..console import FAILURE_FILE

Kind = Literal["input", "stopped", "hang", "failure"]
INPUT, STOPPED, FAILURE = 2, 128 + 15, 1
"""Exit codes of ranks. STOPPED is what a shell shows for a process that SIGTERM ended."""
EXIT_CODES: dict[Kind, int] = {"input": INPUT, "stopped": STOPPED, "hang": FAILURE, "failure": FAILURE}


class RankFailure(RuntimeError):
    """A failure whose message says all: no traceback goes with it."""


class Reason(NamedTuple):
    kind: Kind
    message: str
    rank: int
    is_final: bool
    """Whether another attempt would end the same way."""

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.message}" if self.kind == "failure" else self.message


def attempt() -> int:
    """How often torchrun has started the ranks before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _path(failure_file: str | Path, number: int) -> Path:
    return Path(f"{failure_file}.{number}")


def reason_of(failure_file: str | Path, number: int) -> Reason | None:
    """Why an attempt ended; None if no rank could say it."""
    try:
        return Reason(**json.loads(_path(failure_file, number).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def leave_reason(kind: Kind, message: str) -> None:
    """Tell whoever launched this rank why it ends, or if nobody asked, stderr."""
    failure_file, rank, message = os.environ.get(FAILURE_FILE), int(os.environ.get("RANK", "0")), " ".join(message.split())
    if failure_file is None:
        print(f"triptych: {Reason(kind, message, rank, False)}", file=sys.stderr, flush=True)
        return
    before = reason_of(failure_file, attempt() - 1)
    # An error that comes back with the same words is no accident.
    is_final = kind in ("input", "stopped") or (before is not None and (before.kind, before.message) == (kind, message))
    path = _path(failure_file, attempt())
    beside = path.with_name(f"{path.name}.{rank}.{os.getpid()}")
    beside.write_text(json.dumps(Reason(kind, message, rank, is_final)._asdict()), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(beside, path)


def end_if_final() -> None:
    """End a rank that was started again although the attempt before would only be repeated."""
    failure_file = os.environ.get(FAILURE_FILE)
    if failure_file is None or attempt() == 0:
        return
    before = reason_of(failure_file, attempt() - 1)
    if before is not None and before.is_final:
        leave_reason(before.kind, before.message)
        os._exit(EXIT_CODES[before.kind])
