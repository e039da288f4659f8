"""run.json: what a run ran on and with, an entry a start. Resumes and restarts add theirs; the first rank writes it.

    {"starts": [{
        "time": "2026-01-31T09:26:53+00:00",       when this start had built its model
        "command": "train",
        "from_step": 200,                          0, or that of the checkpoint it goes on from
        "nodes": 2, "world_size": 4,
        "ranks": [{"rank": 0, "host": "n1", "local_rank": 0, "pid": 4711, "cores": 16,       cores this process may use
                   "device": "NVIDIA H100 80GB HBM3"}, ...],                                 GPU, or CPU
        "versions": {"triptych": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", ..., "cuda": null},
        "revision": {"commit": "<40 hex digits>", "dirty": false},     of the code; null where it is not known
        "scheduler": {"SLURM_JOB_ID": "17", ...},                      what of SCHEDULER is set
        "plan": {"file": "plan.json", "sha256": "..."},                files of the run folder as they were at this start
        "recipe": {"file": "recipe.toml", "sha256": "..."}
    }, ...]}

Nothing else of the environment is written: it may hold secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...datasets.schema import InputError
from ...embeddings.control_groups import num_cores
from ..checkpoints.reader import digest_of
from ..distributed import Ranks
from ..writing import write_json

RUN_FILE = "run.json"
REVISION = "TRIPTYCH_REVISION"
"""Environment variable: the commit, and -dirty where it was changed, of code that has no history beside it."""
SCHEDULER = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "TORCHX_JOB_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "AWS_BATCH_JOB_ID", "AWS_BATCH_JOB_ATTEMPT",
)  # fmt: skip
JOB = "TORCHX_JOB_ID"
PACKAGES = ("triptych", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "pyarrow", "numpy")
_ROOT = Path(__file__).parents[2]
_GIT_SECONDS = 20


def record_start(run: Path, command: str, from_step: int, ranks: Ranks) -> None:
    """Add this start to run.json, once plan.json and recipe.toml are there. Collective.

    Raises:
        InputError: on the first rank: run.json cannot be read or written.
    """
    of_ranks = ranks.gather(_of_this_rank(ranks))
    if not ranks.is_first:
        return
    path = run / RUN_FILE
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "from_step": from_step,
        "nodes": ranks.world_size // ranks.local_world_size,
        "world_size": ranks.world_size,
        "ranks": of_ranks,
        "versions": versions(),
        "revision": revision(),
        "scheduler": {name: os.environ[name] for name in SCHEDULER if name in os.environ},
        "plan": _file(run / "plan.json"),
        "recipe": _file(run / "recipe.toml"),
    }
    write_json(path, {"starts": [*starts(run), start]})


def starts(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's run.json; none if there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = run / RUN_FILE
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it, or move it away") from error


def is_of_this_job(run: Path) -> bool:
    """Whether the run's last start was of this very job: its scheduler starts it anew, as after the loss of a node."""
    job, found = os.environ.get(JOB), starts(run)
    return job is not None and bool(found) and found[-1]["scheduler"].get(JOB) == job


def versions() -> dict[str, str | None]:
    """Of Python, the packages that are there, and CUDA; null where torch has none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"cuda": torch.version.cuda}


def revision(root: Path = _ROOT) -> dict[str, Any] | None:
    """The commit of the checkout at `root` and whether it was changed; else what REVISION says; else None."""
    # A wheel may lie inside the checkout of another project.
    if _git(root, "rev-parse", "--show-toplevel") == str(root.resolve()):
        commit, changed = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
        if commit is not None:
            return {"commit": commit, "dirty": None if changed is None else changed != ""}
    told = os.environ.get(REVISION, "")
    return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")} if told else None


def _git(root: Path, *args: str) -> str | None:
    """What git prints; None if there is none, or it refuses."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _of_this_rank(ranks: Ranks) -> dict[str, Any]:
    is_gpu = ranks.device.type == "cuda"
    return {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "local_rank": ranks.local_rank,
        "pid": os.getpid(),
        "cores": num_cores(),
        "device": torch.cuda.get_device_name(ranks.device) if is_gpu else cpu_model(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel names it; where it does not, the architecture."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()


def _file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": digest_of(path)}
