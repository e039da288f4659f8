"""What this process is doing, in the user's words: what a run that hangs is ended with."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class Stage(NamedTuple):
    text: str
    since: float
    """time.monotonic() of its begin."""


_current = Stage("starting", time.monotonic())
_beside = 0.0


def stage(text: str) -> None:
    """Enter the next stage. The same text again means that there was progress. Threads beside training enter none: they show life."""
    global _current, _beside
    if threading.current_thread() is threading.main_thread():
        _current = Stage(text, time.monotonic())
    else:
        _beside = time.monotonic()


def current_stage() -> Stage:
    return _current


def last_progress() -> float:
    """time.monotonic() of the last time that this process entered a stage, or that a thread beside training would have."""
    return max(_current.since, _beside)
