"""Whether all nodes see the same files: a path that one of them lacks is named before the work begins."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ...datasets.schema import InputError
from ...datasets.storage.access import open_input
from ...datasets.storage.filesystems import is_url, parse
from ..distributed import Ranks
from ..faults.stages import stage

SECONDS_TO_APPEAR = 5.0
"""For a file that another node has just made: network file systems remember for a while what was not there."""
READ_WHOLE = (".json", ".toml")
"""Ends of the names of files that are compared by their content, others by their size."""
ADVICE = "use storage that all nodes share and mount it there, or a URL (s3://...)"
PROBE = ".seen_by_all_nodes."
T = TypeVar("T")


class File(NamedTuple):
    """A file as the first node sees it."""

    name: str
    size: int
    digest: str | None


class Asked(NamedTuple):
    """What the other nodes are to look for."""

    node: str
    probes: list[Path]
    files: list[File]
    urls: list[str]


def check_visible(ranks: Ranks, *, folders: Sequence[Path] = (), files: Callable[[], Iterable[str | Path]] = tuple) -> None:
    """Every node sees the folders of the first, and the same files. One rank of each looks. Collective.

    Args:
        folders: to write to; made where they are not there.
        files: names of files that are read, as the first rank finds them.
    Raises:
        InputError: names the path, the node that does not see it, and what to do. On all ranks.
    """
    if ranks.world_size == ranks.local_world_size:
        return
    stage("checking what the nodes see")
    asked = ranks.from_first(lambda: _ask(folders, files()))
    try:
        problem = _problem(asked) if ranks.local_rank == 0 and not ranks.is_first else None
        problems = [found for found in ranks.all_gather(problem) if found is not None]
    finally:
        if ranks.is_first:
            for probe in asked.probes:
                probe.unlink(missing_ok=True)
    if problems:
        raise InputError(problems[0])


def _ask(folders: Sequence[Path], names: Iterable[str | Path]) -> Asked:
    texts = [str(name) for name in names]
    servers = {parse(name).origin: name for name in texts if is_url(name)}  # one of each: asking for all would take long
    try:
        files = [File(name, os.stat(name).st_size, _digest(name)) for name in texts if not is_url(name)]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    probes = []
    for folder in folders:
        probe = folder / f"{PROBE}{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise InputError(f"{folder}: cannot write there ({error.strerror})") from error
        probes.append(probe)
    return Asked(socket.gethostname(), probes, files, list(servers.values()))


def _problem(asked: Asked) -> str | None:
    """What this node does not see."""
    here = socket.gethostname()
    try:
        return _difference(asked, here)
    except OSError as error:
        return f"{error.filename}: node {here} cannot read this path of node {asked.node} ({error.strerror}); {ADVICE}"


def _difference(asked: Asked, here: str) -> str | None:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    for probe in asked.probes:
        if not _appears(probe, deadline):
            if probe.parent.is_dir():
                return f"{probe.parent}: on node {here} this is another folder than on node {asked.node}; {ADVICE}"
            return f"{probe.parent}: node {here} does not see this folder of node {asked.node}; {ADVICE}"
    for file in asked.files:
        if not _appears(Path(file.name), deadline):
            return f"{file.name}: node {here} does not see this file of node {asked.node}; {ADVICE}"
        size, digest = os.stat(file.name).st_size, _digest(file.name)
        if size != file.size:
            return f"{file.name}: {size} bytes on node {here}, {file.size} on node {asked.node}; bring the same files to both, or {ADVICE}"
        if digest != file.digest:
            return f"{file.name}: another content on node {here} than on node {asked.node}; {ADVICE}"
    for url in asked.urls:
        try:
            open_input(url)
        except InputError as error:
            return f"{error} (on node {here}; node {asked.node} reads it)"
    return None


def _appears(path: Path, deadline: float) -> bool:
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes a network file system ask again
    return True


def _digest(name: str) -> str | None:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest() if name.endswith(READ_WHOLE) else None
