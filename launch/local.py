"""Ranks on this machine, through TorchX's local_cwd scheduler: start, follow, and end as they end."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from torchx.runner import get_runner
from torchx.schedulers.api import Stream

from ..datasets.schema import InputError
from .console import FAILURE_FILE, PROGRESS

COMPONENT = Path(__file__).parent / "component.py"
FIRST_RANK = "[0]:"
KEPT_ON_FAILURE = 60
"""Lines of the log shown when ranks fail without saying why."""
KILLED = re.compile(r"rank\s*: (?P<rank>\d+) [^\n]*\n[^\n]*exitcode\s*: -(?P<signal>(?!15\b)\d+)")
"""A killed rank in torchrun's report, which may call the rank that lost it the root cause. SIGTERM is torchrun's own doing."""


class RanksFailed(RuntimeError):
    """Ranks ended with an error that is not the user's."""


def launch(command: str, args: Sequence[str], *, ranks: int, log_dir: Path) -> None:
    """Run a component of component.py on this machine and wait for it.

    Args:
        command: name of the component.
        log_dir: a folder, where TorchX keeps the ranks' output.
    Raises:
        InputError: a rank found the input wrong.
        RanksFailed: anything else; names the log.
    """
    # TorchX starts `torchrun` by name, and the environment of this Python need not be active.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
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
        tail = _follow(runner.log_lines(handle, command, 0, should_tail=True, streams=Stream.COMBINED))
        status = runner.wait(handle, wait_interval=0.2)
        if failure_file.exists():
            reason = json.loads(failure_file.read_text(encoding="utf-8"))
            if reason["kind"] == "input":
                raise InputError(reason["message"])
            raise RanksFailed(f"rank {reason['rank']} failed: {reason['message']}; its log is under {log_dir}")
        if status is None or status.state.name != "SUCCEEDED":
            killed = KILLED.search("\n".join(tail))
            if killed:
                raise RanksFailed(
                    f"rank {killed['rank']} was killed by signal {killed['signal']} (out of memory?); the log is under {log_dir}"
                )
            print("\n".join(tail), file=sys.stderr)
            raise RanksFailed(f"the ranks ended as {status.state.name if status else 'unknown'}; their log is under {log_dir}")


def _whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """TorchX reads the log in blocks, so a line may come in two pieces."""
    held = ""
    for piece in pieces:
        held += piece
        if held.endswith("\n"):
            yield held.rstrip()
            held = ""
    if held:
        yield held


def _follow(lines: Iterable[str]) -> list[str]:
    """Print what the first rank says, as a bar on a terminal; return the last lines of all ranks."""
    console = Console()
    tail: list[str] = []
    note = TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True), note)
    bar = Progress(*columns, console=console, expand=True) if console.is_terminal else None
    with bar or nullcontext():
        stages: dict[str, TaskID] = {}
        for line in _whole_lines(lines):
            tail = [*tail, line][-KEPT_ON_FAILURE:]
            if not line.startswith(FIRST_RANK):
                continue
            text = line.removeprefix(FIRST_RANK)
            progress = PROGRESS.match(text)
            if bar is None or progress is None:
                console.print(text, markup=False, highlight=False, soft_wrap=True)
                continue
            stage, done, total = progress["stage"], int(progress["done"]), int(progress["total"])
            if stage not in stages:
                stages[stage] = bar.add_task(stage, note="")
            bar.update(stages[stage], completed=done, total=total, note=progress["note"] or "")
    return tail
