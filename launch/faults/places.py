"""Where in this package something happens, for one line to the user: `datasets/parquet/files.py:88 read`."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType

_ROOT = Path(__file__).parents[2]
_OWN = ("datasets/", "embeddings/", "mmoe/", "launch/")
_WATCHING = ("launch/faults/", "launch/nodes/bounded_store.py")
_MOST_THREADS = 4


def _own(frame: FrameType) -> str | None:
    """The file of a frame, if it is the package's, relative to its root: an environment may lie below the root too."""
    path = Path(frame.f_code.co_filename)
    inside = path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) else ""
    return inside if inside.startswith(_OWN) else None


def _innermost(stack: Iterable[tuple[FrameType, int]]) -> str | None:
    """The first frame of a stack, from inside out, that is the package's."""
    for frame, line in stack:
        file = _own(frame)
        if file is not None:
            return None if file.startswith(_WATCHING) else f"{file}:{line} {frame.f_code.co_name}"
    return None


def place_of(trace: TracebackType | None) -> str | None:
    """Of an exception."""
    return _innermost(reversed(list(traceback.walk_tb(trace))))


def places_of_threads() -> str:
    """Of the main thread, then of threads beside it that run the package's code."""
    frames, main = sys._current_frames(), threading.main_thread()
    found = []
    for thread in [main, *(thread for thread in threading.enumerate() if thread is not main)]:
        place = _innermost(traceback.walk_stack(frames[thread.ident])) if thread.ident in frames else None
        if place is not None:
            found.append(place if thread is main else f"{thread.name}: {place}")
    return "; ".join(found[:_MOST_THREADS])


def is_in_collective() -> bool:
    """Whether the main thread is inside torch.distributed or torchrec.distributed, and not in the package's code below them."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and _own(frame) is None:
        if "distributed" in Path(frame.f_code.co_filename).parts:
            return True
        frame = frame.f_back
    return False
