"""What a rank says: plain lines that a log keeps and that the launcher turns into a progress bar on a terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import TextIO

from .faults.stages import current_stage, stage

PROGRESS = re.compile(r"^(?P<stage>\S+) (?P<done>\d+)/(?P<total>\d+)(?: (?P<note>.*))?$")
FAILURE_FILE = "TRIPTYCH_FAILURE_FILE"
"""Environment variable: where a failing rank leaves its reason for whoever launched it."""
FROM_LAUNCHER = "triptych: "
"""Before the lines that are not a rank's but the launcher's of a node."""
SECONDS_BETWEEN_LINES = 2.0


def say(text: str) -> None:
    print(text, flush=True)


def warn_with_stage() -> None:
    """From now on warnings of this process, also those that packages log, are one line that says in which stage they came."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        print(_in_stage(f"{category.__name__}: {message} ({filename}:{lineno})"), file=file or sys.stderr, flush=True)

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return _in_stage(super().format(record))

    warnings.showwarning = show
    if logging.lastResort is not None:  # of loggers that have no handler
        logging.lastResort.setFormatter(Formatter("%(message)s (%(name)s)"))


def _in_stage(text: str) -> str:
    return f"warning in '{current_stage().text}': {' '.join(text.split())}"


@dataclass
class ProgressLines:
    """`stage done/total note`, at most one every two seconds, and the last. Silent unless `enabled`; on every rank a sign of life."""

    stage: str
    enabled: bool
    last: float = field(default=0.0)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        stage(f"{self.stage} {done} of {total}")
        now = time.monotonic()
        if self.enabled and (done >= total or now - self.last >= SECONDS_BETWEEN_LINES):
            self.last = now
            say(f"{self.stage} {done}/{total} {note}".rstrip())


def summary(report: dict) -> str:
    """The metrics of a report in one line: `ctr auc 0.7358, cvr auc 0.6468, dwell mae 18.67`."""
    shown = {"binary": "auc", "duration": "mae"}
    parts = []
    for name, metrics in report["tasks"].items():
        value = metrics[shown[metrics["kind"]]]
        parts.append(f"{name} {shown[metrics['kind']]} {'n/a' if value is None else format(value, '.4f')}")
    return ", ".join(parts)
