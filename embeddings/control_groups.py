"""What control groups leave to this process: a container or a scheduler may give less than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROCESS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_NAMES = ("memory.current", "inactive_file")
_OLD_NAMES = ("memory.usage_in_bytes", "total_inactive_file")
"""Of what a group holds, and of what of it the system can drop."""


class MemoryLimit(NamedTuple):
    """Bytes."""

    limit: int
    held: int
    """Without what the system drops when memory is short."""


def memory_limits(process: Path = _PROCESS, root: Path = _ROOT) -> Iterator[MemoryLimit]:
    """Of the process's control group and those above it that limit memory, of either version; none outside Linux."""
    for folder, is_old in _folders("memory", process, root):
        limit, names = ("memory.limit_in_bytes", _OLD_NAMES) if is_old else ("memory.max", _NAMES)
        try:
            yield MemoryLimit(int((folder / limit).read_text()), _held(folder, *names))
        except (OSError, ValueError):  # not there, or "max"
            continue


def num_cores(process: Path = _PROCESS, root: Path = _ROOT) -> int:
    """Processors that this process may use at a time: those it may run on, less where a quota says so."""
    quotas = []
    for folder, is_old in _folders("cpu", process, root):
        try:
            if is_old:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if int(quota) > 0:  # -1 is none
                quotas.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _folders(controller: str, process: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """Of the process's control group and those above it; and whether they are of version 1."""
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # id:controllers:path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        # In a container the path may be the host's, where only the top is to be seen.
        group = top / path.strip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(top):
                yield folder, bool(controllers)


def _held(group: Path, usage: str, reclaimable: str) -> int:
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int((group / usage).read_text()) - int(statistics[reclaimable]))
    except (OSError, ValueError, KeyError):
        return 0
