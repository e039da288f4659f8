"""Kills at known points of a training: a rank that takes part in a campaign arms the first of a plan that was not carried out."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from triptych.launch import trainer as trainer_module
from triptych.launch.checkpoints import manifest, reader, saver, snapshot, tensor_file
from triptych.launch.evaluations import Evaluations
from triptych.launch.records import Records

CARRIED_OUT = "kills.jsonl"
POINTS = {
    "step": "a step is trained",
    "evaluated": "an evaluation is done, and not yet recorded",
    "record": "half a line of metrics.jsonl is written",
    "text NAME": "half of a small file is written",
    "rename NAME": "before a file or folder gets its name; after it: renamed NAME. A checkpoint's is `checkpoint`",
    "file": "before a file of tensors; after it: file written",
    "block": "half a block of tensors is written",
    "commit": "the tensors of all ranks are written, the manifest is not",
    "sync": "before the manifest, the folder, and its parent are synced",
    "prune": "a checkpoint has its name, older ones are to be deleted; also: prune N, of step N",
    "unlink": "a file of a folder is deleted; also: unlink after N, of step N",
    "verify": "a file of a checkpoint is verified, to resume",
    "read": "a tensor is read, to resume",
}
"""Where a kill can be: what was just done. The points of `sync` to `prune` and of small files are the first rank's."""


class Kill(NamedTuple):
    """A signal at the `count`-th time that `rank` reaches a point, counted in each attempt."""

    at: str
    """One of POINTS."""
    count: int = 1
    rank: int = 0
    """The one that reaches the point; of fewer ranks, the last."""
    who: str = "self"
    """Who gets the signal: self, other (the next rank), all, torchrun, or everyone: all and torchrun."""
    signal: str = "KILL"
    delay: float = 0.0
    """Seconds after the point; another process sends the signal then."""

    @property
    def kind(self) -> str:
        words = self.at.split()
        return f"SIG{self.signal} {self.who}: {' '.join(word for word in words if not word.isdigit())}"


class Executioner:
    """Carries out at most one kill of a plan in this process's life.

    Args:
        folder: where it is written down which were carried out.
        pids: of all ranks.
        attempt: what to write down besides.
    """

    def __init__(self, plan: Sequence[Kill], folder: Path, rank: int, pids: Sequence[int], attempt: str) -> None:
        self.path, self.rank, self.pids, self.attempt = folder / CARRIED_OUT, rank, pids, attempt
        done = len(self.path.read_text().splitlines()) if self.path.exists() else 0
        kill = plan[done] if done < len(plan) else None
        self.kill = kill if kill is not None and min(kill.rank, len(pids) - 1) == rank else None
        self.counts: Counter[str] = Counter()
        self.pruning = ""

    def reached(self, *points: str) -> None:
        """This process is at a point now, which may have several names."""
        for point in points:
            self.counts[point] += 1
            if self.kill is not None and self.kill.at == point and self.counts[point] == self.kill.count:
                self._carry_out(self.kill)

    def _carry_out(self, kill: Kill) -> None:
        self.kill = None
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kill.kind, "attempt": self.attempt, "time": time.time() + kill.delay}) + "\n")
        others = [pid for pid in self.pids if pid != os.getpid()]
        victims = {
            "self": [os.getpid()],
            "other": [self.pids[(self.rank + 1) % len(self.pids)]],
            "all": [*others, os.getpid()],
            "torchrun": [os.getppid()],
            "everyone": [*others, os.getpid(), os.getppid()],
        }[kill.who]
        if kill.delay:
            text = f"sleep {kill.delay}; kill -{kill.signal} {' '.join(map(str, victims))}"
            subprocess.Popen(["sh", "-c", text], start_new_session=True)
            return
        for victim in victims:
            os.kill(victim, getattr(signal, f"SIG{kill.signal}"))

    def arm(self) -> None:
        """Have everything that reaches a point say so. It still does what it did."""
        self._wrap(snapshot, "write_tensors", before=("file",), after=("file written",))
        self._wrap(saver, "commit", before=("commit",))
        self._wrap(saver, "prune", before=("prune",), name=self._prunes)
        self._wrap(manifest, "sync", before=("sync",))
        self._wrap(os, "unlink", before=("unlink",), name=lambda *_: f"after {self.pruning}" if self.pruning else "")
        self._wrap(Evaluations, "add", after=("evaluated",))
        self._wrap(reader, "digest_of", before=("verify",))
        self._wrap(reader, "read_region", before=("read",))
        for owner, function in ((Path, "rename"), (Path, "replace"), (os, "replace")):
            self._wrap(owner, function, before=("rename",), after=("renamed",), name=_new_name)
        self._halve(Path, "write_text", lambda path: f"text {path.name}", _half_text)
        self._halve(Records, "write", lambda records: "record", _half_record)
        self._halve(tensor_file, "_write", lambda file: "block", _half_block)
        assert trainer_module.Evaluations is Evaluations

    def _prunes(self, checkpoints: Path, *rest: Any) -> str:
        self.pruning = str(manifest.step_of(manifest.committed(checkpoints)[-1]))
        return self.pruning

    def _wrap(
        self,
        owner: Any,
        function: str,
        *,
        before: tuple[str, ...] = (),
        after: tuple[str, ...] = (),
        name: Callable[..., str] | None = None,
    ) -> None:
        original = getattr(owner, function)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            of = "" if name is None else name(*args)
            self.reached(*before, *(f"{point} {of}" for point in before if of))
            result = original(*args, **kwargs)
            self.reached(*after, *(f"{point} {of}" for point in after if of))
            return result

        setattr(owner, function, wrapped)

    def _halve(self, owner: Any, function: str, point: Callable[[Any], str], half: Callable[[Any, Any], Any]) -> None:
        """Where a kill is due, do half first."""
        original = getattr(owner, function)

        @functools.wraps(original)
        def wrapped(target: Any, content: Any, *args: Any, **kwargs: Any) -> Any:
            at = point(target)
            if self.kill is not None and self.kill.at == at and self.counts[at] + 1 == self.kill.count:
                half(target, content)
            self.reached(at)
            return original(target, content, *args, **kwargs)

        setattr(owner, function, wrapped)


def _new_name(source: Any, target: Any, *more: Any) -> str:
    name = Path(target).name
    return "checkpoint" if re.fullmatch(r"step_\d+", name) else name


def _half_text(path: Path, content: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(content[: len(content) // 2])


def _half_record(records: Records, record: dict[str, Any]) -> None:
    text = json.dumps(record)
    with records.path.open("a", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])


def _half_block(file: Any, content: memoryview) -> None:
    tensor_file.leave_direct(file)
    file.write(content[: len(content) // 2])
