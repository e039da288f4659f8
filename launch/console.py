"""What a rank says: plain lines that a log keeps and that the launcher turns into a progress bar on a terminal."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from .faults.stages import stage

PROGRESS = re.compile(r"^(?P<stage>\S+) (?P<done>\d+)/(?P<total>\d+)(?: (?P<note>.*))?$")
FAILURE_FILE = "TRIPTYCH_FAILURE_FILE"
"""Environment variable: where a failing rank leaves its reason for whoever launched it."""
SECONDS_BETWEEN_LINES = 2.0


def say(text: str) -> None:
    print(text, flush=True)


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
