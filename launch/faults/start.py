"""What a rank does first, ahead of the imports that take seconds."""

from __future__ import annotations

import ctypes
import os
import signal

from .reasons import FAILURE, end_if_final

_PR_SET_PDEATHSIG = 1


def start_rank() -> None:
    """Under torchrun, end with it: a rank must not train on beside the run that takes its place. And end if trying again is of no use."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        torchrun = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != torchrun:
            os._exit(FAILURE)  # it ended before it could be said that this rank ends with it
        end_if_final()
