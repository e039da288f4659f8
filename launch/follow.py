"""What the ranks on this machine say: the first rank's lines as they come, as a bar on a terminal, and the launcher's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from .console import FROM_LAUNCHER, PROGRESS

FIRST_RANK = "[0]:"
KEPT_ON_FAILURE = 60
"""Lines of the log shown when ranks fail without saying why."""


@dataclass
class Followed:
    """The log of one launch, shown while it grows."""

    console: Console = field(default_factory=Console)
    tail: list[str] = field(default_factory=list)
    """The last lines of all ranks."""

    def follow(self, pieces: Iterable[str]) -> None:
        """Show the log of a launch until it ends."""
        note = TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True), note)
        bar = Progress(*columns, console=self.console, expand=True) if self.console.is_terminal else None
        with bar or nullcontext():
            stages: dict[str, TaskID] = {}
            for line in _whole_lines(pieces):
                self.tail = [*self.tail, line][-KEPT_ON_FAILURE:]
                if line.startswith(FROM_LAUNCHER):
                    self.say(line.removeprefix(FROM_LAUNCHER))
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
