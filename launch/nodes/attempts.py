"""What torchrun logs, in the user's words: which lines are for the user, why an attempt failed, and how it all ended."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..faults.reasons import Reason, reason_of
from .last_words import on

RANK = re.compile(r"\[\d+\]:")
"""What torchrun puts before each line of a rank."""
KEPT_ON_FAILURE = 60
"""Lines of the log shown when ranks fail without saying why."""
_FAILED = re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+) ")
"""What torchrun logs at the end of an attempt, of the first rank that it saw fail."""
_KILLED = re.compile(r"rank\s*: (?P<rank>\d+) [^\n]*\n[^\n]*exitcode\s*: -(?P<signal>(?!15\b)\d+)")
"""A killed rank in torchrun's report, which may call the rank that lost it the root cause. SIGTERM is torchrun's own doing."""
_STACK = re.compile(
    r"(\[rank\d+\]:)?\[[WEI]\d{4} [\d:.]+ \S+\.(cpp|cc|hpp|h):\d+\]|frame #\d+: |<omitting python frames>|Exception raised from |$"
)
"""Of torch's C++ parts, in a rank that loses another, or waits for one: a stack of many lines, and no word to the user."""


def is_for_the_user(line: str) -> bool:
    """Lines of ranks are, without the C++ stacks in them; torchrun's own are for who develops it."""
    rank = RANK.match(line)
    return rank is not None and not _STACK.match(line, rank.end())


@dataclass
class Attempts:
    """Of the ranks of this node, under one torchrun.

    Args:
        failure_file: where the ranks leave their reasons.
        restarts: how often torchrun starts the ranks again.
        host: of this node, where there are several.
    """

    failure_file: str
    restarts: int
    host: str | None = None
    tail: list[str] = field(default_factory=list)
    """The last lines of torchrun and the ranks."""
    failed: int = 0

    def take(self, line: str) -> str | None:
        """Take in a line of the log.

        Returns:
            What to tell the user: that ranks start again, and why.
        """
        self.tail = [*self.tail, line][-KEPT_ON_FAILURE:]
        found = None if RANK.match(line) else _FAILED.search(line)
        if found is None:
            return None
        self.failed += 1
        reason = reason_of(self.failure_file, self.failed - 1)
        if self.failed > self.restarts or (reason is not None and reason.is_final):
            return None
        code = int(found["code"])
        if code < 0 and (reason is None or reason.kind == "lost"):
            rank = f"a rank on {self.host}" if self.host else f"rank {found['rank']}"  # torchrun tells the one of this node
            cause = f"{rank} was killed by signal {-code}"
        else:
            cause = str(reason or "a rank was lost")
        return f"{cause}; restarting all ranks from the last checkpoint (restart {self.failed} of {self.restarts})"

    @property
    def _reasons(self) -> tuple[Reason | None, Reason | None]:
        """Of the present attempt, and of the one before."""
        number = min(self.failed, self.restarts)
        return reason_of(self.failure_file, number), reason_of(self.failure_file, number - 1) if number > 0 else None

    @property
    def left(self) -> tuple[Reason | None, bool]:
        """What a rank said as it ended, in the present attempt or, if none did, the one before; and whether no attempt follows."""
        reason, before = self._reasons
        if reason is not None:
            return reason, reason.is_final or self.failed >= self.restarts
        return before, before is not None and before.is_final

    @property
    def end(self) -> Reason | None:
        """Why the last attempt ended: as a rank of this node or another said it, or as torchrun reports it."""
        reason, before = self._reasons
        if reason is None and before is not None and before.is_final:  # no attempt came of it: another node gave up before
            reason = before
        if reason is not None and reason.kind != "lost":
            return reason
        killed = _KILLED.search("\n".join(self.tail))
        if killed is None:
            return reason or before
        where = f"rank {killed['rank']}{on(self.host)}"
        return Reason("lost", f"{where} was killed by signal {killed['signal']} (out of memory?)", int(killed["rank"]))
