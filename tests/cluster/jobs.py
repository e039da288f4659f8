"""Jobs as a user of the cluster submits them: TorchX's command line on the head."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.cluster.slurm import Slurm

ROOT = Path(__file__).parents[2]
COMPONENT = ROOT / "launch" / "component.py"
PARTITION = "partition=dev"
SECONDS_A_JOB = 150


class Job:
    """One that was submitted.

    Args:
        folder: where it was submitted, and where Slurm leaves its logs.
        handle: what TorchX calls it: `slurm://torchx/7`.
    """

    def __init__(self, slurm: Slurm, folder: Path, handle: str) -> None:
        self.slurm, self.folder, self.handle = slurm, folder, handle
        self.id = handle.rpartition("/")[2]

    def torchx(self, command: str, *args: object) -> str:
        """What a TorchX command prints of this job: status, log or cancel."""
        return torchx(self.slurm, self.folder, command, *args)

    @property
    def state(self) -> str:
        """RUNNING, PENDING, ...; nothing once it is over."""
        return self.slurm.user("squeue", "-h", "-j", self.id, "-o", "%T", check=False).partition("\n")[0].strip()

    def _reasons(self) -> list[str]:
        """Of each node's part, why it waits."""
        return self.slurm.user("squeue", "-h", "-j", self.id, "-o", "%r", check=False).split()

    @property
    def log(self) -> str:
        """Of all nodes."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"slurm-{self.id}*")))

    def wait_for(self, is_so: Callable[[], bool], what: str, seconds: float = SECONDS_A_JOB) -> float:
        """Returns how many seconds it took. Raises AssertionError, with the job's log."""
        try:
            return self.slurm.wait_for(is_so, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log[-6000:]}") from None

    def succeeds(self, seconds: float = SECONDS_A_JOB) -> Job:
        """Wait for its end, which must be a good one."""
        self.wait_for(lambda: self.state == "", f"job {self.id} ends", seconds)
        self.wait_for(lambda: "State: RUNNING" not in self.torchx("status", self.handle), "accounting knows it", 30)
        assert "State: SUCCEEDED" in self.torchx("status", self.handle), self.log[-6000:]
        return self

    def begin_soon(self) -> None:
        """What an administrator does: Slurm lets a requeued job wait for two minutes.

        Some seconds it needs: nodes revoke the job's old credential, and with it any that is as old.
        """
        self.wait_for(lambda: self._reasons() == ["BeginTime", "BeginTime"], "both nodes are cleared")
        self.slurm.user("scontrol", "update", f"JobId={self.id}", "StartTime=now+5")


def torchx(slurm: Slurm, folder: Path, *args: object) -> str:
    """What a TorchX command prints. Raises AssertionError if it fails."""
    command = slurm.head.inside(Path(sys.executable).with_name("torchx"), *args)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=slurm.env, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(slurm: Slurm, folder: Path, name: str, component: Path = COMPONENT, **args: object) -> Job:
    """`torchx run` a component over two nodes, one rank each."""
    folder.mkdir(exist_ok=True)
    options = [str(part) for key, value in {"nodes": 2, "ranks": 1, "memMB": 3000, **args}.items() for part in (f"--{key}", value)]
    printed = torchx(slurm, folder, "run", "--scheduler", "slurm", "-cfg", PARTITION, f"{component}:{name}", *options)
    return Job(slurm, folder, printed.strip().splitlines()[-1])
