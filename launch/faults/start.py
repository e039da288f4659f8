"""What a process of a run does first, ahead of the imports that take seconds."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from types import TracebackType

from .reasons import FAILURE, end_if_final, leave_reason

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, however that was."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILURE)  # it ended before it could be said that this process ends with it


def start_rank() -> None:
    """Under torchrun, end with it: a rank must not train on beside the run that takes its place. And end if trying again is of no use."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
        sys.excepthook = _leave_reason
        end_if_final()


def _leave_reason(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of what fails before the rank's work begins: an import, above all."""
    traceback.print_exception(kind, error, trace)
    leave_reason("failure", f"{kind.__name__}: {error}")
    sys.stderr.flush()
    os._exit(FAILURE)
