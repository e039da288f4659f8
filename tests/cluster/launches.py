"""The launcher on some hosts, started as by hand, without a scheduler: one a host, which meet on the first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.cluster.hosts import Host

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
SECONDS_TO_REACH = 60
PORT = 29500


def num_lines(path: Path) -> int:
    """Of a file that may not be there yet."""
    return path.read_text().count("\n") if path.exists() else 0


class Ended(NamedTuple):
    code: int
    log: str
    seconds: float
    """Since all were started."""


class Launch:
    """One launch. A context: what still runs at its end is killed.

    Args:
        ranks: on each host.
        args: of the module.
        endpoint: where they meet, as the hosts resolve it; the first host's name if not given.
        nodes: how many there will be, if some are added later.
        restarts: how often torchrun starts the ranks again.
        env: besides what torchrun and the ranks get anyway.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        ranks: int,
        args: Sequence[object],
        logs: Path,
        *,
        module: str = "triptych.launch.train",
        endpoint: str = "",
        nodes: int = 0,
        restarts: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.at_once, self.logs = hosts, logs
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint or hosts[0].name}:{PORT}", "--rdzv-id", "run"]
        size = ["--nnodes", nodes or len(hosts), "--nproc-per-node", ranks, "--max-restarts", restarts]
        self.command = [sys.executable, "-m", "triptych.launch.node", *size, *meeting, "-m", module, *args]
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        logs.mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Launch:
        self.started = time.monotonic()
        for host in self.at_once:
            self.add(host)
        return self

    def add(self, host: Host, **env: str) -> None:
        """Start the launcher on one more host."""
        log = self._log(len(self.processes))
        self.processes.append(host.start(*self.command, log=log, env={**self.env, **env}, cwd=ROOT))

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, number: int) -> str:
        return self._log(number).read_text()

    def _log(self, number: int) -> Path:
        return self.logs / f"{number}.log"

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = SECONDS_TO_REACH, *, numbers: Sequence[int] | None = None) -> None:
        """Fails if that takes longer, or if a launcher fails meanwhile: any, or one of these numbers."""
        watched = self.processes if numbers is None else [self.processes[number] for number in numbers]
        deadline = time.monotonic() + timeout_s
        while not is_so():
            in_time = time.monotonic() < deadline
            assert in_time and all(process.poll() in (None, 0) for process in watched), [
                self.log(number)[-3000:] for number in range(len(self.processes))
            ]
            time.sleep(0.02)

    def ended(self, timeout_s: float = TIMEOUT_S) -> list[Ended]:
        """Of each host. Raises TimeoutExpired if one still runs."""
        deadline = time.monotonic() + timeout_s
        ended = []
        for number, process in enumerate(self.processes):
            code = process.wait(max(0.1, deadline - time.monotonic()))
            ended.append(Ended(code, self.log(number), time.monotonic() - self.started))
        return ended

    def succeeds(self, timeout_s: float = TIMEOUT_S) -> float:
        """Seconds it took."""
        ended = self.ended(timeout_s)
        assert all(each.code == 0 for each in ended), "\n".join(each.log[-3000:] for each in ended)
        return ended[-1].seconds
