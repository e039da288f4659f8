"""Files that are there after a power loss: written beside, synced, renamed, and the folder synced."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_place(beside: Path, path: Path) -> None:
    """Give a written file its name: readers see the old content or the new, never half."""
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".writing")
    beside.write_text(text, encoding="utf-8")
    take_place(beside, path)
