"""Being asked to stop (SIGTERM, as before a preemption): training ends a few steps later, saves, and exits."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    asked: bool = False

    @classmethod
    def of_this_process(cls) -> StopRequest:
        """From now on SIGTERM asks, and no longer ends the process."""
        request = cls()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, request._ask)
        return request

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
