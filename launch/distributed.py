"""One rank: its process group, device and threads, and how it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..datasets.schema import InputError
from ..embeddings.control_groups import num_cores
from ..embeddings.memory import DeviceType, Machine, this_machine
from .console import warn_with_stage
from .faults.meeting import meet
from .faults.places import place_of
from .faults.reasons import FAILURE, INPUT, RankFailure, leave_reason, pass_on, pass_on_reason
from .faults.stages import current_stage, stage
from .faults.stop import listen
from .faults.watchdog import Watchdog
from .nodes import last_words
from .nodes.bounded_store import is_asking
from .nodes.early_words import Told
from .nodes.interfaces import check_interfaces, choose_interface
from .stack import has_cuda_kernels

TIMEOUT_S = 1800.0
"""Until ranks that do not get on are ended, unless the recipe says otherwise."""
BACKSTOP = timedelta(days=1)
"""Of one collective. The watchdog is earlier, and names who hangs; ranks may wait longer than its timeout for one that works."""
LOST_A_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "remote process exited", "Failed to recv",
    "Failed to send", "Connection was likely closed",
)  # fmt: skip
"""Signs that another rank went first: the reason to tell is that one's."""
SECONDS_BEHIND = 1.0
"""Until a rank ends that lost another: torchrun takes the first that it sees ended for the cause, and looks every 0.1 s."""
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all ranks: a folder may list differently a moment later, or elsewhere. Collective."""
        made: list[Any] = [make() if self.is_first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(made)
        return made[0]

    def all_gather(self, part: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The parts of all ranks, on all of them. Collective."""
        parts: list[Any] = [part] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, part, group=group)
        return parts

    def own_group(self) -> dist.ProcessGroup | None:
        """For a thread beside training, whose messages must not mix with those of training; None where there is one rank. Collective."""
        return dist.new_group(backend="gloo", timeout=BACKSTOP) if self.world_size > 1 else None

    def gather(self, part: T) -> list[T]:
        """The parts of all ranks on the first, nothing on the others. Collective."""
        parts: list[Any] = [part] * self.world_size if self.is_first else []
        if self.world_size > 1:
            dist.gather_object(part, parts if self.is_first else None)
        return parts


def _device(local_rank: int, local_world_size: int) -> torch.device:
    if device_type() == "cpu":
        return torch.device("cpu")
    if local_world_size > torch.cuda.device_count():
        raise InputError(f"{local_world_size} ranks on this node, but it has {torch.cuda.device_count()} GPUs; use one rank a GPU")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def quiet_the_stack() -> None:
    """Drop what the packages below say to their own developers; what remains is for the user."""
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(DTensor|deprecated)")
    # A recipe of one task: its towers' gradients have another layout than DDP would choose.
    warnings.filterwarnings("ignore", category=UserWarning, message="Grad strides do not match bucket view strides")
    # Replicated tables on CPU: their training equals a plain nn.EmbeddingBag's (tests/multiprocess/test_equivalence.py).
    warnings.filterwarnings("ignore", category=UserWarning, message="fbgemm::dense_embedding_codegen_lookup_function")
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Sharding spec not found"))
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)


def machine_of_ranks() -> Machine:
    """What the ranks that torchrun started have, read from the environment: before they join each other."""
    return this_machine(device_type(), _from_torchrun("WORLD_SIZE", 1), _from_torchrun("LOCAL_WORLD_SIZE", 1))


def _from_torchrun(name: str, otherwise: int) -> int:
    return int(os.environ.get(name, otherwise))


def device_type() -> DeviceType:
    return "cuda" if torch.cuda.is_available() and has_cuda_kernels() else "cpu"


@contextlib.contextmanager
def process_group(timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only one. gloo serves CPU tensors, nccl CUDA tensors.

    Args:
        timeout_s: seconds that ranks wait for each other at the start, and that all may be without progress before they are ended.
    Raises:
        RankFailure: not all ranks came.
        Told: one failed before it came.
        InputError: more ranks than GPUs, or no network interface of the name that the user gave.
    """
    quiet_the_stack()
    world_size, rank = _from_torchrun("WORLD_SIZE", 1), _from_torchrun("RANK", 0)
    local_rank, local_world_size = _from_torchrun("LOCAL_RANK", 0), _from_torchrun("LOCAL_WORLD_SIZE", 1)
    device = _device(local_rank, local_world_size)
    check_interfaces()
    # torchrun sets one thread a rank; the machine's cores are there to be shared out.
    torch.set_num_threads(max(1, num_cores() // local_world_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = meet(rank, world_size, timeout_s) if world_size > 1 else dist.HashStore()
    last_words.share(store, rank, world_size)
    if world_size > local_world_size:
        choose_interface(store, rank, world_size, timeout_s)
    with Watchdog(rank, world_size, store, timeout_s):
        stage("joining the other ranks")
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=BACKSTOP)
        ranks = Ranks(rank, world_size, local_rank, local_world_size, device)
        yield ranks
        stage("leaving the other ranks")
        # The first may work on alone, and schedulers and torchrun give the nodes minutes to end together.
        ranks.all_gather(None)
        # Only after success: with work outstanding it may block, and a failing rank must first say why.
        dist.destroy_process_group()


def run_rank(work: Callable[[], None]) -> None:
    """Run one rank's work as a process's main: wrong input exits with 2 and one line, anything else with 1 and a traceback."""
    listen()
    warn_with_stage()
    try:
        work()
    except InputError as error:
        leave_reason("input", str(error))
        os._exit(INPUT)  # other ranks may wait in a collective, and so would an orderly exit
    except RankFailure as error:
        leave_reason("failure", str(error))
    except Told as told:
        os._exit(pass_on(str(told)))
    except Exception as error:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_A_PEER):
            print(f"lost another rank in '{current_stage().text}' ({_place(error)})", file=sys.stderr)
            ends_at = time.monotonic() + SECONDS_BEHIND
            pass_on_reason(SECONDS_BEHIND)
            time.sleep(max(0.0, ends_at - time.monotonic()))
        else:
            traceback.print_exc()
            leave_reason("failure", f"{type(error).__name__}: {error} ({_place(error)})")
    else:
        if not is_asking():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.stderr.flush()
    os._exit(FAILURE)


def _place(error: Exception) -> str:
    return place_of(error.__traceback__) or "outside the package"
