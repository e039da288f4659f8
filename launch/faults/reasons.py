"""Why a rank ended, for whoever launched it. Of an attempt the first reason counts: others follow from it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

from ..console import FAILURE_FILE, FROM_LAUNCHER
from ..nodes import last_words
from ..nodes.early_words import is_waited_for, tell_waiting
from .stages import current_stage

Kind = Literal["input", "stopped", "hang", "lost", "failure"]
INPUT, STOPPED, FAILURE = 2, 128 + 15, 1
"""Exit codes of ranks. STOPPED is what a shell shows for a process that SIGTERM ended."""
EXIT_CODES: dict[Kind, int] = {"input": INPUT, "stopped": STOPPED, "hang": FAILURE, "lost": FAILURE, "failure": FAILURE}
_END = "end"


class RankFailure(RuntimeError):
    """A failure whose message says all: no traceback goes with it."""


class Reason(NamedTuple):
    kind: Kind
    """`lost`: of a rank that could not say more itself."""
    message: str
    rank: int
    is_final: bool = False
    """Whether another attempt would end the same way."""
    host: str | None = None
    """Where ranks are on several."""
    stage: str | None = None

    def __str__(self) -> str:
        if self.kind != "failure":
            return self.message
        stage = f" in '{self.stage}'" if self.stage else ""
        return f"rank {self.rank}{last_words.on(self.host)} failed{stage}: {self.message}"

    def as_json(self) -> str:
        return json.dumps(self._asdict())


def attempt() -> int:
    """How often torchrun has started the ranks before. On a node that only joined again, the others' failures do not count."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _path(failure_file: str | Path, number: int | str) -> Path:
    return Path(f"{failure_file}.{number}")


def reason_of(failure_file: str | Path, number: int | str) -> Reason | None:
    """Why an attempt ended; None if no rank could say it."""
    try:
        return Reason(**json.loads(_path(failure_file, number).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def leave_end(failure_file: str | Path, reason: Reason) -> None:
    """Why all attempts ended, from the launcher of a node to the one above it."""
    _path(failure_file, _END).write_text(reason.as_json(), encoding="utf-8")


def end_of(failure_file: str | Path) -> Reason | None:
    """As left by leave_end."""
    return reason_of(failure_file, _END)


def leave_reason(kind: Kind, message: str) -> None:
    """Tell whoever launched this rank why it ends, or if nobody asked, stderr; and the ranks on other nodes."""
    failure_file, rank, message = os.environ.get(FAILURE_FILE), int(os.environ.get("RANK", "0")), " ".join(message.split())
    if kind == "input" and is_waited_for():
        message += f" (on {last_words.host()})"  # the only one that finds it wrong, maybe
    before = reason_of(failure_file, attempt() - 1) if failure_file else None
    # An error that comes back with the same words is no accident.
    is_final = kind in ("input", "stopped") or (before is not None and kind != "lost" and (before.kind, before.message) == (kind, message))
    reason = Reason(kind, message, rank, is_final, last_words.host(), current_stage().text)
    _leave(reason)
    last_words.tell(reason.as_json())
    tell_waiting(reason.as_json())


def pass_on(words: str) -> int:
    """As leave_reason, of a rank that was told another's; returns its exit code."""
    reason = Reason(**json.loads(words))
    _leave(reason)
    return EXIT_CODES[reason.kind]


def pass_on_reason(seconds: float) -> None:
    """As leave_reason, of a rank that lost another: that one's words, which come within some seconds, if it could say any."""
    words = last_words.heard(seconds)
    if words is not None:
        _leave(Reason(**json.loads(words)))
        return
    silent = last_words.silent() or (last_words.host() and f"a rank on {os.environ.get('MASTER_ADDR')}")  # where the store was
    if silent:
        _leave(Reason("lost", f"{silent} went without a word: killed, or the node is gone", int(os.environ.get("RANK", "0"))))


def _leave(reason: Reason) -> None:
    failure_file = os.environ.get(FAILURE_FILE)
    if failure_file is None:
        print(f"{FROM_LAUNCHER}{reason}", file=sys.stderr, flush=True)
        return
    path = _path(failure_file, attempt())
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', '0')}.{os.getpid()}")
    beside.write_text(reason.as_json(), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(beside, path)


def end_if_final() -> None:
    """End a rank that was started again although the attempt before would only be repeated."""
    failure_file = os.environ.get(FAILURE_FILE)
    if failure_file is None:
        return
    before = _left_before(failure_file) or reason_of(failure_file, attempt() - 1)
    if before is not None and before.is_final:
        _leave(before)
        os._exit(EXIT_CODES[before.kind])


def _left_before(failure_file: str) -> Reason | None:
    """Take what was left under the number of this attempt by an earlier one: a node that only joined again has not counted it."""
    path = _path(failure_file, attempt())
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < _started_at():
            reason = reason_of(failure_file, attempt())
            path.unlink()
            return reason
    return None


def _started_at() -> float:
    """When this process was, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
