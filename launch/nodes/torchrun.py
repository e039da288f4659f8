"""torchrun as the launcher of a node starts it: it ends with the launcher, and hears signals that come together as one."""

from __future__ import annotations

import os
import sys
import time
from types import FrameType
from typing import Any

from ...datasets.schema import InputError
from ..faults.reasons import INPUT, leave_reason
from ..faults.start import end_with_parent


def main() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api

    from ..faults.stop import ONE_REQUEST_S

    raise_signal, heard_at = api._terminate_process_handler, -ONE_REQUEST_S

    def once(signum: int, frame: FrameType | None) -> None:
        """A second signal would end torchrun while its ranks save: schedulers signal all processes, and the launcher passes on its own."""
        nonlocal heard_at
        if time.monotonic() - heard_at >= ONE_REQUEST_S:
            heard_at = time.monotonic()
            raise_signal(signum, frame)

    api._terminate_process_handler = once
    _set_addresses(run.get_args_parser().parse_args())
    run.main()


def _set_addresses(args: Any) -> None:
    """Where other nodes reach this one, as torchrun reads it from its environment."""
    from .interfaces import torchrun_settings

    if args.nnodes != "1" and args.rdzv_endpoint:
        os.environ.update(torchrun_settings(args.rdzv_endpoint))


if __name__ == "__main__":
    end_with_parent()
    try:
        main()
    except InputError as error:
        leave_reason("input", str(error))
        sys.exit(INPUT)
