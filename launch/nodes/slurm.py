"""What the launcher of a node does for jobs on Slurm: a port that no other job uses, and no retry of what would fail again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence

from .torchrun import option

PORT_OF_JOB = "--port-of-job"
_FIRST_PORT, _PORTS_A_JOB = 20000, 10


def with_port_of_job(args: Sequence[str]) -> list[str]:
    """torchrun's arguments; on Slurm, whose jobs share nodes, with a port that no other of a thousand jobs uses."""
    others = [arg for arg in args if arg != PORT_OF_JOB]
    job, endpoint = _job(others), option(others, "rdzv_endpoint") or ""
    host, _, port = endpoint.rpartition(":")
    if len(others) == len(args) or job is None or host == "localhost":
        return others
    of_job = f"{host}:{_FIRST_PORT + int(job) % 1000 * _PORTS_A_JOB + int(port) % _PORTS_A_JOB}"
    return [of_job if arg == endpoint else arg for arg in others]


def _job(args: Sequence[str]) -> str | None:
    """The job's number, which is the same on all nodes as SLURM_JOB_ID is not."""
    job = option(args, "rdzv_id") or ""
    return job if "SLURM_JOB_ID" in os.environ and job.isdigit() else None


def end_retries(args: Sequence[str]) -> None:
    """Wrong input stays wrong: TorchX's script on Slurm would queue the job again after any failure."""
    job = _job(args)
    if job is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # then it is tried again
            subprocess.run(["scontrol", "update", f"JobId={job}", "Requeue=0"], capture_output=True, timeout=30, check=False)
