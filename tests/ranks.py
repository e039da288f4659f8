"""Run a function on several ranks and get each rank's result: the one way tests start processes of a group."""

from __future__ import annotations

import os
import pickle
import random
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from triptych.launch.distributed import Ranks, quiet_the_stack

TIMEOUT_SECONDS = 240
PRELOADED = ["triptych.launch.trainer"]
"""What nearly all ranks import, for seconds: once, in the process of which they are forks. They share the order of its sets, as ranks of
torchrun do not: `make test-long` has them spawned."""


def run_on_ranks(world_size: int, work: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """`[work(ranks, *args) for each rank]`, each in a process of its own, joined by gloo.

    Args:
        work: a function at the top level of its module.
    Raises:
        AssertionError: a rank failed (with its traceback), exited with a code, or took longer than `timeout` seconds.
    """
    context: Any = get_context(os.environ.get("TRIPTYCH_TEST_RANKS", "forkserver"))
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    environ = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, world_size, folder, environ, work, args)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error_*"))]
        assert not errors, "\n".join(errors)
        assert not hanging, f"{len(hanging)} of {world_size} ranks still ran after {timeout} s"
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]  # noqa: S301


def _rank(rank: int, world_size: int, folder: str, environ: dict[str, str], work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        os.environ.clear()  # a test's, not those with which the server was started
        os.environ.update(environ)
        random.seed()
        np.random.seed()
        quiet_the_stack()
        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = work(Ranks(rank, world_size, rank, world_size, torch.device("cpu")), *args)
        dist.barrier()
        dist.destroy_process_group()
        Path(folder, f"result_{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
