"""The manifest of a checkpoint: every tensor's shape and where its parts are, every file's size and SHA-256, and its own.

A checkpoint is written as `step_200.writing`, synced, and renamed: what has the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...datasets.durable import replace_text, sync
from ...datasets.schema import InputError

MANIFEST = "manifest.json"
FORMAT = 2
WRITING, DELETING, DAMAGED = ".writing", ".deleting", ".damaged"
"""Ends of the names of what is no checkpoint yet, no more, or no whole one."""


class Damaged(InputError):
    """A checkpoint is not what was committed."""


def joined(entries: Iterable[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The manifest's text.

    Args:
        entries: of each rank: `files`, {name: size and SHA-256}, and `tensors`, {name: shape, dtype and parts}.
        facts: JSON besides.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for entry in entries:
        files |= entry["files"]
        for name, tensor in entry["tensors"].items():
            whole = tensors.setdefault(name, {**tensor, "parts": []})
            whole["parts"] += tensor["parts"]
    return signed({"format": FORMAT, **facts, "files": files, "tensors": tensors})


def signed(content: dict[str, Any]) -> str:
    return json.dumps({**content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        Damaged: it is missing or damaged, or of another step than its folder's name.
        InputError: it cannot be read, or is of another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        content = dict(json.loads(text))
        # Some bits can flip without changing what is parsed: the case of an exponent's `e`, or of a hex digit in an escape.
        is_whole = text == json.dumps(content) and content.pop("sha256") == _digest(content)
        step, version = content["step"], content["format"]
    except FileNotFoundError as error:
        raise Damaged(f"{path}: missing") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: not a readable manifest ({error})") from error
    if not is_whole:
        raise Damaged(f"{path}: damaged (its SHA-256 differs from its content)")
    if version != FORMAT:
        raise InputError(f"{folder}: checkpoint format {version}; this version reads {FORMAT}")
    if folder.name != step_name(step):
        raise Damaged(f"{path}: is of step {step}; the folder was renamed")
    return content


def step_name(step: int) -> str:
    return f"step_{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def committed(checkpoints: Path) -> list[Path]:
    """Checkpoints, oldest first. Each was whole when it got its name."""
    return sorted((path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def chosen_step(steps: Sequence[int], result: bytes) -> int:
    """Of the steps of a run's checkpoints, in ascending order: the best of a finished run, or the newest of one that goes on.

    Args:
        result: what is in result.json; nothing where it is not there.
    """
    try:
        best = json.loads(result)["step"]
    except (ValueError, KeyError, TypeError):
        return steps[-1]
    return best if best in steps else steps[-1]


def commit(writing: Path, folder: Path, manifest: str) -> None:
    """Give a written checkpoint its manifest and its name."""
    path = writing / MANIFEST
    path.write_text(manifest, encoding="utf-8")
    sync(path)
    sync(writing)
    if folder.exists():
        delete(folder)
    writing.rename(folder)
    sync(folder.parent)


def amend(folder: Path, facts: dict[str, Any]) -> None:
    """Replace facts of a committed checkpoint, and nothing else."""
    replace_text(folder / MANIFEST, signed(read_manifest(folder) | facts))


def prune(checkpoints: Path, keep: int, best: Sequence[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those of the `best` steps, and what was never finished."""
    for path in committed(checkpoints)[:-keep]:
        if step_of(path) not in best:
            delete(path)
    for ending in (WRITING, DELETING):
        for path in checkpoints.glob(f"step_*{ending}"):
            shutil.rmtree(path)


def delete(folder: Path) -> None:
    """Take a checkpoint's name away first: half of one must never look whole."""
    doomed = folder.with_name(folder.name + DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
