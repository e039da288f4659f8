"""Writing the small files of a run: whole or not at all, and with one line where it cannot be done."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..datasets.durable import replace_text
from ..datasets.schema import InputError


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """What is done inside writes a file of a run.

    Raises:
        InputError: it cannot be written; names it.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); mend this and go on with --resume") from error


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: readers see the old content or the new, never half.

    Raises:
        InputError: it cannot be written.
    """
    with written(path):
        replace_text(path, text)


def write_json(path: Path, content: Any) -> None:
    """As write_text."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def check_file(file: Path) -> None:
    """The file can be written, which is better known before the work than after it.

    Raises:
        InputError: it cannot.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; give a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{file.parent}: cannot make the folder ({error.strerror})") from error
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{file.parent}: cannot write there")
