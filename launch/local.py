"""Ranks on this machine, through TorchX's local_cwd scheduler: start, follow, stop, and end as they end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from torchx.runner import get_runner
from torchx.schedulers.api import Stream
from torchx.schedulers.local_scheduler import SignalException

from ..datasets.schema import InputError
from ..embeddings.control_groups import num_cores
from .console import FAILURE_FILE
from .faults.reasons import Reason, end_of
from .follow import Followed

COMPONENT = Path(__file__).parent / "component.py"
NODE = "triptych.launch.node"
STOPPING = {"train": "stopping: saving a checkpoint"}
"""By command; others have nothing to save."""
INTERRUPTED = "interrupted; a training goes on from its last checkpoint with --resume"


class RanksFailed(RuntimeError):
    """Ranks ended with an error that is not the user's."""


class Stopped(RuntimeError):
    """Ranks ended because they were asked to."""


def launch(command: str, args: Sequence[str], *, ranks: int, log_dir: Path) -> None:
    """Run a component of component.py on this machine and wait for it.

    Args:
        command: name of the component.
        log_dir: a folder, where TorchX keeps the ranks' output.
    Raises:
        InputError: a rank found the input wrong.
        RanksFailed: anything else; names the log.
        Stopped: the ranks were asked to stop, by this process or another.
    """
    # TorchX starts `python` by name, and the environment of this Python need not be active.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // ranks)))
    print(f"{command}: starting {ranks} rank{'s' if ranks > 1 else ''} through TorchX, logs in {log_dir}", flush=True)
    with tempfile.TemporaryDirectory() as scratch, get_runner() as runner:
        failure_file = Path(scratch) / "failure.json"
        os.environ[FAILURE_FILE] = str(failure_file)
        handle = runner.run_component(
            f"{COMPONENT}:{command}",
            [*args, "--ranks", str(ranks)],
            "local_cwd",
            {"log_dir": str(log_dir), "auto_set_cuda_visible_devices": False},
        )
        followed = Followed()
        with _passing_on_signals(STOPPING.get(command, "stopping")) as signals:
            followed.follow(runner.log_lines(handle, command, 0, should_tail=True, streams=Stream.COMBINED))
            status = runner.wait(handle, wait_interval=0.2)
        if status is None or status.state.name != "SUCCEEDED":
            _raise(end_of(failure_file), bool(signals), log_dir, followed.tail)


def _raise(reason: Reason | None, was_asked: bool, log_dir: Path, tail: Sequence[str]) -> None:
    """The failure of a launch, in the user's words."""
    if was_asked and (reason is None or reason.kind == "lost"):
        raise Stopped(INTERRUPTED)
    if reason is None:
        print("\n".join(tail), file=sys.stderr)
        raise RanksFailed(f"the ranks ended, and none said why; their log is under {log_dir}")
    if reason.kind == "input":
        raise InputError(reason.message)
    if reason.kind == "stopped":
        raise Stopped(reason.message)
    raise RanksFailed(f"{reason}; its log is under {log_dir}")


@contextlib.contextmanager
def _passing_on_signals(stopping: str) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and a closed terminal ask the ranks to stop, which may take a while; the second ends all at once.

    TorchX would end the ranks ten seconds after the first.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        below = _below(os.getpid())
        node = [pid for pid in below if _is_node(pid)]
        if not node:
            raise SignalException("stopped before the ranks' launcher was there", signal.Signals(number))
        if len(came) == 1:
            # Not print: it may be what the signal interrupted.
            os.write(2, f"\n{stopping}; press Ctrl-C again to end at once\n".encode())
            _send(node, signal.SIGTERM)
        else:
            _send(below, signal.SIGKILL)

    # One that is ignored stays so, as under nohup.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _below(ancestor: int) -> list[int]:
    """The processes that a process started, those that these started, and so on."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [ancestor]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _is_node(pid: int) -> bool:
    """Whether it is the launcher of the ranks (node.py), and not a shell that starts it."""
    try:
        return NODE in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
