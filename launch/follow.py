"""What the ranks on this machine say: the first rank's lines as they come, as a bar on a terminal, and a line for every restart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from .console import PROGRESS
from .faults.reasons import Reason, reason_of

FIRST_RANK = "[0]:"
KEPT_ON_FAILURE = 60
"""Lines of the log shown when ranks fail without saying why."""
_RANK = re.compile(r"\[\d+\]:")
_FAILED = re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+) ")
"""What torchrun logs at the end of an attempt, of the first rank that it saw fail."""
_KILLED = re.compile(r"rank\s*: (?P<rank>\d+) [^\n]*\n[^\n]*exitcode\s*: -(?P<signal>(?!15\b)\d+)")
"""A killed rank in torchrun's report, which may call the rank that lost it the root cause. SIGTERM is torchrun's own doing."""


@dataclass
class Followed:
    """The attempts of one launch.

    Args:
        failure_file: where ranks leave their reasons.
        restarts: how often torchrun starts the ranks again.
    """

    failure_file: Path
    restarts: int
    console: Console = field(default_factory=Console)
    tail: list[str] = field(default_factory=list)
    """The last lines of all ranks."""
    attempts: int = 0
    """That failed."""

    @property
    def reason(self) -> Reason | None:
        """Why the last attempt ended, as far as a rank could say it."""
        return reason_of(self.failure_file, min(self.attempts, self.restarts))

    @property
    def killed(self) -> str | None:
        """Which rank was killed in the last attempt, if torchrun reports one."""
        found = _KILLED.search("\n".join(self.tail))
        return f"rank {found['rank']} was killed by signal {found['signal']} (out of memory?)" if found else None

    def follow(self, pieces: Iterable[str]) -> None:
        """Show the log of a launch until it ends."""
        note = TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True), note)
        bar = Progress(*columns, console=self.console, expand=True) if self.console.is_terminal else None
        with bar or nullcontext():
            stages: dict[str, TaskID] = {}
            for line in _whole_lines(pieces):
                self.tail = [*self.tail, line][-KEPT_ON_FAILURE:]
                failed = None if _RANK.match(line) else _FAILED.search(line)
                if failed:
                    self._failed(int(failed["code"]), failed["rank"])
                if not line.startswith(FIRST_RANK) or line == FIRST_RANK:  # torchrun's report has such lines
                    continue
                text = line.removeprefix(FIRST_RANK)
                progress = PROGRESS.match(text)
                if bar is None or progress is None:
                    self.say(text)
                    continue
                stage, done, total = progress["stage"], int(progress["done"]), int(progress["total"])
                if stage not in stages:
                    stages[stage] = bar.add_task(stage, note="")
                bar.update(stages[stage], completed=done, total=total, note=progress["note"] or "")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _failed(self, code: int, rank: str) -> None:
        """An attempt is over."""
        self.attempts += 1
        reason = reason_of(self.failure_file, self.attempts - 1)
        if self.attempts > self.restarts or (reason is not None and reason.is_final):
            return
        cause = str(reason) if reason else f"rank {rank} was killed by signal {-code}" if code < 0 else "a rank was lost"
        self.say(f"{cause}; restarting all ranks from the last checkpoint (restart {self.attempts} of {self.restarts})")


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
