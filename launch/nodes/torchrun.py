"""torchrun as a node's launcher starts it: it ends with the launcher, hears signals that come together once, and finds a moved store."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from ...datasets.schema import InputError
from ..faults.reasons import INPUT, leave_reason
from ..faults.start import end_with_parent

_SECONDS_TO_REACH = 5.0


def option(args: Sequence[str], name: str) -> str | None:
    """What torchrun is told with an option."""
    for word, value in zip(args, [*args[1:], ""], strict=True):
        given, _, inline = word.partition("=")
        if given.startswith("--") and given[2:].replace("-", "_") == name:
            return inline or value
        if given in ("-m", "--module"):  # what follows are the ranks' arguments
            return None
    return None


def is_there(endpoint: str) -> bool:
    """Whether the place where nodes meet, host:port, takes connections."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _SECONDS_TO_REACH):
            return True
    except (OSError, ValueError):
        return False


def main() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    from ..faults.stop import ONE_REQUEST_S

    raise_signal, heard_at = api._terminate_process_handler, -ONE_REQUEST_S

    def once(signum: int, frame: FrameType | None) -> None:
        """A second signal would end torchrun while its ranks save: schedulers signal all processes, and the launcher passes on its own."""
        nonlocal heard_at
        if time.monotonic() - heard_at >= ONE_REQUEST_S:
            heard_at = time.monotonic()
            raise_signal(signum, frame)

    next_rendezvous = DynamicRendezvousHandler.next_rendezvous

    def anew(handler: Any) -> Any:
        """Where the ranks' store is was known from the first start on, though the node that keeps it may be another, started anew."""
        handler._bootstrap_store_info = None
        return next_rendezvous(handler)

    api._terminate_process_handler = once
    DynamicRendezvousHandler.next_rendezvous = anew  # type: ignore[assignment,method-assign]
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
