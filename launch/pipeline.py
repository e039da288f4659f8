"""The launcher of several stages on each node: python -m triptych.launch.pipeline TORCHRUN_ARGUMENTS --then TORCHRUN_ARGUMENTS ...

Stage after stage, each as of node.py; the first that fails ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import node

THEN = "--then"


def stages_of(args: Sequence[str]) -> list[list[str]]:
    """The arguments of each stage."""
    stages: list[list[str]] = [[]]
    for arg in args:
        if arg == THEN:
            stages.append([])
        else:
            stages[-1].append(arg)
    return stages


def main(args: Sequence[str]) -> int:
    return next((code for code in map(node.main, stages_of(args)) if code != 0), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
