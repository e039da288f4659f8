"""Being asked to stop (SIGTERM, as before a preemption): training ends a few steps later, saves, and exits."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType

from .reasons import STOPPED
from .stages import current_stage

ONE_REQUEST_S = 5.0
"""SIGTERMs within so long are one request: a scheduler may signal the ranks and torchrun, which passes it on."""


@dataclass
class StopRequest:
    """Whether a training was asked to stop."""

    asked_at: float | None = None
    """time.monotonic() of the first SIGTERM."""

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def ask(self) -> None:
        self.asked_at = self.asked_at or time.monotonic()

    @classmethod
    def of_this_process(cls) -> StopRequest:
        """From now on SIGTERM asks. Another one, some seconds later, ends the process."""
        global _request
        _request = cls()
        listen()
        return _request


_request: StopRequest | None = None
_is_listening = False


def asked_at() -> float | None:
    """When this process was asked to stop; None if it was not."""
    return None if _request is None else _request.asked_at


def listen() -> None:
    """SIGTERM ends this process at once, unless there is a training to be asked.

    A thread hears it: handlers in Python wait for the main thread, which may be in a collective that never ends.
    """
    global _is_listening
    if _is_listening or threading.current_thread() is not threading.main_thread():
        return
    _is_listening = True
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _handle)
    threading.Thread(target=_hear, args=(heard,), name="stop", daemon=True).start()


def _handle(number: int, frame: FrameType | None) -> None:
    if _request is not None:
        _request.ask()


def _hear(heard: int) -> None:
    while True:
        for number in os.read(heard, 64):
            if number == signal.SIGTERM:
                _heard()


def _heard() -> None:
    if _request is not None and (_request.asked_at is None or time.monotonic() - _request.asked_at < ONE_REQUEST_S):
        _request.ask()
        return
    again = "" if _request is None else " again"
    print(f"triptych: asked to stop{again}; ending at once, in '{current_stage().text}'", file=sys.stderr, flush=True)
    os._exit(STOPPED)
