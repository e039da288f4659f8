"""The command line in a process of its own: the one way tests run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 180


def triptych(*args: object, cwd: Path = ROOT.parent) -> subprocess.CompletedProcess[str]:
    """Run a command, from another folder than the checkout's."""
    command = [sys.executable, "-m", "triptych.launch.cli", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=cwd, env=env, check=False)


def succeeds(*args: object, cwd: Path = ROOT.parent) -> str:
    """What a command printed that ended well."""
    done = triptych(*args, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that found its input wrong."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("triptych: "), done.stderr
    return done.stderr
