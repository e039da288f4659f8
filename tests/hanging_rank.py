"""One rank that gets stuck, or only seems to: torchrun ... -m tests.hanging_rank SCENE TIMEOUT_S [RECIPE RUN]"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch.distributed as dist

from triptych.datasets.batch import Batch
from triptych.datasets.ids import string_codes
from triptych.datasets.schema import InputError
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks, process_group, run_rank
from triptych.launch.faults import watchdog
from triptych.launch.faults.stages import stage
from triptych.launch.faults.start import start_rank
from triptych.launch.faults.stop import StopRequest
from triptych.launch.trainer import Trainer

STEPS_READ = 4


def block() -> None:
    threading.Event().wait()


def reading(ranks: Ranks, timeout_s: float) -> None:
    """Training, in which the last rank's storage stops to answer."""
    trainer = Trainer(load_recipe(sys.argv[3]), Path(sys.argv[4]), ranks, resume=False)
    batches = trainer.loader.batches

    def some_batches(*args: object) -> Iterator[Batch]:
        for number, batch in enumerate(batches(*args)):
            if number == STEPS_READ:
                block()
            yield batch

    if ranks.rank == ranks.world_size - 1:
        trainer.loader.batches = some_batches  # type: ignore[method-assign]
    trainer.fit()


def working(ranks: Ranks, timeout_s: float) -> None:
    """Rank 0 works longer than the timeout, and the others wait for it."""
    if ranks.is_first:
        ends = time.monotonic() + 3 * timeout_s
        while time.monotonic() < ends:
            stage("working")
            time.sleep(timeout_s / 10)
    dist.barrier()


def beside(ranks: Ranks, timeout_s: float) -> None:
    """As `working`, in a thread that the main thread waits for, as for a checkpoint."""
    thread = threading.Thread(target=working, args=(ranks, timeout_s))
    thread.start()
    thread.join()


def asked(ranks: Ranks, timeout_s: float) -> None:
    """The last rank is stuck; the others are asked to stop in a collective, where no Python runs."""
    watchdog.GRACE_AFTER_SIGTERM_S = 3.0
    StopRequest.of_this_process()
    if ranks.rank == ranks.world_size - 1:
        stage("thinking")
        block()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    dist.barrier()


def still(ranks: Ranks, timeout_s: float) -> None:
    """The processes of the second node stand still."""
    dist.barrier()
    if os.environ["GROUP_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def one_still(ranks: Ranks, timeout_s: float) -> None:
    """The last rank of a node of two stands still."""
    dist.barrier()
    if ranks.local_rank == 1:
        stage("thinking")
        time.sleep(timeout_s / 5)  # so that this stage is told
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def one_asked(ranks: Ranks, timeout_s: float) -> None:
    """The last rank of a node of two is stuck. Who is alone on the other node is asked to stop, and so is the first to end."""
    dist.barrier()
    if ranks.local_rank == 1:
        stage("thinking")
        block()
    if ranks.local_world_size == 1:
        watchdog.GRACE_AFTER_SIGTERM_S = 3.0
        StopRequest.of_this_process()
        threading.Timer(timeout_s / 5, os.kill, (os.getpid(), signal.SIGTERM)).start()  # then that stage is told
    dist.barrier()


def early(ranks: Ranks, timeout_s: float) -> None:
    """SIGTERM to a rank that waits for another one, while there is nothing to save."""
    if ranks.rank == ranks.world_size - 1:
        block()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    dist.barrier()


def raising(ranks: Ranks, timeout_s: float) -> None:
    """The last rank has an error that is not the user's; the others lose it."""
    if ranks.rank == ranks.world_size - 1:
        string_codes(pa.array([1.5]))
    dist.barrier()


def refusing(ranks: Ranks, timeout_s: float) -> None:
    """The last rank finds the input wrong; the others lose it."""
    if ranks.rank == ranks.world_size - 1:
        raise InputError("rows.parquet: no such column")
    dist.barrier()


def work() -> None:
    scene, timeout_s = sys.argv[1], float(sys.argv[2])
    if scene == "missing" and os.environ["RANK"] != "0":
        block()
    with process_group(timeout_s) as ranks:
        globals()[scene.replace(" ", "_")](ranks, timeout_s)


if __name__ == "__main__":
    start_rank()
    run_rank(work)
