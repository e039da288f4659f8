"""The launcher on each node: python -m triptych.launch.node [--port-of-job] TORCHRUN_ARGUMENTS

It starts torchrun, shows what the ranks say, and ends with why they ended, as its last line and as its exit code: 0 done, 2 wrong
input, 143 stopped and saved, 1 anything else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TextIO

import psutil

from .console import FAILURE_FILE, FROM_LAUNCHER
from .faults.reasons import EXIT_CODES, FAILURE, Reason, leave_end
from .faults.start import end_with_parent
from .nodes.attempts import Attempts, is_for_the_user
from .nodes.last_words import on
from .nodes.slurm import end_retries, with_port_of_job
from .nodes.torchrun import is_there, option

PREFIX = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"
PREFIXED = ("--tee", "3")
"""Without it torchrun would leave away what tells the ranks' lines apart."""
RESTARTS = "PET_MAX_RESTARTS"
SECONDS_WITHOUT_RANKS = 15.0
"""After the last rank's end, until torchrun is ended too, if no other ranks can follow."""
_SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_LAST_LINES = 10.0
"""After torchrun's end, until lines that a process left behind may still write are given up."""


class Node:
    """One torchrun and its ranks.

    Args:
        args: torchrun's.
        scratch: a folder for the ranks' reasons and for what torchrun says.
    """

    def __init__(self, args: Sequence[str], scratch: Path) -> None:
        self.args = with_port_of_job(args)
        self.is_under_launcher = FAILURE_FILE in os.environ
        """A launcher above shows what is for the user; here all lines pass, and it is told how this ended."""
        self.failure_file = os.environ.get(FAILURE_FILE, str(scratch / "failure.json"))
        several = option(args, "nnodes") not in (None, "1", "1:1")
        self.attempts = Attempts(self.failure_file, _restarts(args), socket.gethostname() if several else None)
        self.log = scratch / "torchrun.log"
        self.asked: list[int] = []

    def run(self) -> int:
        """Until torchrun ends; returns the exit code of this process."""
        env = {**os.environ, FAILURE_FILE: self.failure_file, PREFIX: "[${rank}]:"}  # not the rank among those of this node
        command = [sys.executable, "-u", "-m", "triptych.launch.nodes.torchrun", *PREFIXED, *self.args]
        # A session of its own: signals of a terminal come here, and are passed on once.
        torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True)
        assert torchrun.stdout is not None and torchrun.stderr is not None
        with self._passing_on_signals(torchrun), self.log.open("w", encoding="utf-8") as log:
            streams = ((torchrun.stdout, sys.stdout), (torchrun.stderr, sys.stderr))
            readers = [threading.Thread(target=self._read, args=(*stream, log), daemon=True) for stream in streams]
            for reader in readers:
                reader.start()
            code = self._wait(torchrun)
            for reader in readers:
                reader.join(SECONDS_FOR_LAST_LINES)
        return self._end(code)

    def _wait(self, torchrun: subprocess.Popen[bytes]) -> int:
        """Until it ends. Where the host of the rendezvous lost power, it would wait for that host for minutes."""
        had_ranks, told = time.monotonic(), None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return torchrun.wait(_SECONDS_BETWEEN_LOOKS)
            reason, is_over = self.attempts.left
            if reason is None or _has_children(torchrun.pid):
                had_ranks = time.monotonic()
                continue
            if time.monotonic() - had_ranks <= SECONDS_WITHOUT_RANKS:
                continue
            if is_over or not self._can_meet_again():
                torchrun.kill()
            elif told != reason:
                told = reason
                _write(sys.stdout, f"{FROM_LAUNCHER}{reason}; waiting for all nodes to start their ranks again")

    def _can_meet_again(self) -> bool:
        """Whether torchrun can meet those of the other nodes: it does so at most 600 s later, or gives up."""
        endpoint = option(self.args, "rdzv_endpoint")
        return self.attempts.host is None or endpoint is None or is_there(endpoint)

    def _read(self, pipe: IO[bytes], out: TextIO, log: TextIO) -> None:
        """Pass a stream on, line by line, without what is not for the user."""
        for raw in pipe:
            line = raw.decode(errors="replace").rstrip()
            told = self.attempts.take(line)
            if self.is_under_launcher or is_for_the_user(line):
                _write(out, line)
            else:
                _write(log, line)
            if told is not None:
                _write(sys.stdout, f"{FROM_LAUNCHER}{told}")

    def _end(self, code: int) -> int:
        end = self.attempts.end if code else None
        if end is None:
            end = self._end_without_words(code)
        elif end.kind == "stopped" and self.attempts.host is not None and not self.asked:
            # torchrun does so, too, where it lost the other nodes, or the place where they met.
            end = Reason("lost", f"{end}; this node was not asked, but another one, or torchrun ended its ranks", end.rank)
        if end is not None and end.kind == "input":
            end_retries(self.args)
        if self.is_under_launcher:
            if end is not None:
                leave_end(self.failure_file, end)
        elif end is not None:
            if end.kind not in ("input", "stopped"):
                _write(sys.stderr, f"{FROM_LAUNCHER}what torchrun said is in {self.log}{on(self.attempts.host)}")
            _write(sys.stderr, f"{FROM_LAUNCHER}{end}")
        return code if end is None else EXIT_CODES[end.kind]

    def _end_without_words(self, code: int) -> Reason | None:
        """Of ranks none of which said why they ended."""
        if code == 0 or self.is_under_launcher:
            return None
        if self.asked:
            return Reason("stopped", "stopped as asked; a training goes on from its last checkpoint with --resume", 0)
        if code < 0:
            return Reason("lost", f"torchrun{on(self.attempts.host)} was killed by signal {-code} (out of memory?)", 0)
        _write(sys.stderr, "\n".join(self.attempts.tail))
        return Reason("lost", f"torchrun ended with {code}, and no rank said why; the last lines are above", 0)

    @contextlib.contextmanager
    def _passing_on_signals(self, torchrun: subprocess.Popen[bytes]) -> Iterator[None]:
        """As SIGTERM: the ranks save, where there is something to save. torchrun may hear them itself too."""

        def pass_on(number: int, frame: FrameType | None) -> None:
            self.asked.append(number)
            torchrun.terminate()

        # One that is ignored stays so, as under nohup.
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _has_children(pid: int) -> bool:
    """Whether they live: whoever is stuck does not bury the others."""
    try:
        return any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(pid).children())
    except psutil.NoSuchProcess:  # it ended meanwhile
        return False


def _restarts(args: Sequence[str]) -> int:
    """How often torchrun is told to start ranks again."""
    return int(option(args, "max_restarts") or os.environ.get(RESTARTS, "0"))


def _write(out: TextIO, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read it is gone, or it is closed: the ranks go on
        out.write(f"{line}\n")
        out.flush()


def main(args: Sequence[str]) -> int:
    if FAILURE_FILE in os.environ:
        end_with_parent()  # the launcher above
    scratch = Path(tempfile.mkdtemp(prefix="triptych_"))
    code = Node(args, scratch).run()
    if code != FAILURE or FAILURE_FILE in os.environ:
        shutil.rmtree(scratch, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
