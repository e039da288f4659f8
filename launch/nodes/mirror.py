"""A run at a URL: each node works in a folder of its own, and what is committed is brought to the URL.

    URL/checkpoints/step_200/rank_0.0.safetensors   uploaded by the rank that wrote it
                             manifest.json          uploaded last, when all ranks are done: with it the checkpoint is there
    URL/recipe.toml  plan.json  metrics.jsonl ...   uploaded before it, where they changed
    URL/.lock                                       which training writes here; the one before finds another name in it, and ends

What the URL has counts. A node's folder spares what need not be fetched again, and may be deleted at any time between two trainings.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...datasets.schema import InputError
from ...datasets.storage.access import StorageError
from ..checkpoints.manifest import DAMAGED, MANIFEST, WRITING, Damaged, chosen_step, read_manifest, signed, step_name
from ..checkpoints.reader import digest_of
from ..distributed import Ranks
from ..faults.stages import stage
from .remote import FETCHING, RemoteFolder, at_a_time, is_remote, local_path

CACHE = "TRIPTYCH_CACHE"
"""Environment variable: where nodes keep their copies of runs at URLs; $XDG_CACHE_HOME/triptych, or ~/.cache/triptych, unless set."""
CHECKPOINTS, LOCK = "checkpoints", ".lock"
OWN = (CHECKPOINTS, "logs", LOCK)
"""What a node's folder has for itself, or what is brought to the URL in another way."""
T = TypeVar("T")


class TakenOver(StorageError):
    """Another training writes to the same URL."""


def cache() -> Path:
    """This node's copies of runs. The home folder may be shared by nodes: each has a folder of its name."""
    base = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "triptych")
    return Path(base) / "runs" / socket.gethostname()


class RunAtUrl:
    """A run at a URL, and the folder of this node that stands for it.

    Raises:
        InputError: from any method: the storage cannot be reached or refuses; names the URL.
    """

    def __init__(self, url: str) -> None:
        self.remote = RemoteFolder(url)
        self.url = self.remote.url
        name = re.sub(r"[^\w.-]+", "_", self.url.partition("?")[0].rpartition("/")[2]) or "run"
        self.copy = cache() / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

    def __str__(self) -> str:
        return self.url

    def url_of(self, path: Path) -> str:
        """Of what this path stands for."""
        return self.remote.url_of(path.relative_to(self.copy).as_posix())

    def steps(self) -> list[int]:
        """Of the committed checkpoints, in ascending order."""
        found = sorted(int(name[5:]) for name in self.remote.folders(CHECKPOINTS) if re.fullmatch(r"step_\d+", name))
        sizes = self.remote.sizes([f"{CHECKPOINTS}/{step_name(step)}/{MANIFEST}" for step in found])
        return [step for step, size in zip(found, sizes, strict=True) if size is not None]

    def chosen_step(self, steps: Sequence[int]) -> int:
        """Of its checkpoints, as the function of this name has it."""
        return chosen_step(steps, self.remote.read("result.json") or b"")

    def fetch(self, name: str) -> None:
        """Bring a file to this node; what is not there is not here afterwards."""
        if self.remote.sizes([name]) == [None]:
            (self.copy / name).unlink(missing_ok=True)
        else:
            self.remote.fetch(name, self.copy / name)

    def fetch_fitted(self) -> None:
        at_a_time(self.fetch, self.remote.files("fitted"))

    def fetch_small(self) -> None:
        """All but checkpoints."""
        found = [name for name in self.remote.files("", without=CHECKPOINTS) if name != LOCK and not name.endswith(WRITING)]
        for name in {path.name for path in self.copy.iterdir() if path.is_file()} - {*found, *OWN}:
            (self.copy / name).unlink()
        at_a_time(lambda name: self.remote.fetch(name, self.copy / name), found)

    def fetch_manifest(self, step: int) -> Path:
        """Returns the folder of this node that stands for the checkpoint; its other files may be lacking."""
        folder = self.copy / CHECKPOINTS / step_name(step)
        self.fetch(f"{CHECKPOINTS}/{folder.name}/{MANIFEST}")
        return folder


def located(run: str) -> tuple[Path, RunAtUrl | None]:
    """The folder of a run on this node, and what is known of its URL; None if it is a local folder."""
    if not is_remote(run):
        return local_path(run), None
    at_url = RunAtUrl(run)
    return at_url.copy, at_url


class Mirror:
    """Keeps a run at a URL and the nodes' folders alike. Every rank makes one. Collective.

    Attributes:
        leads: whether this rank renames and deletes in its node's folder, for all ranks that share it.
        newest: step of the newest checkpoint that this training read or wrote.
    """

    def __init__(self, run: RunAtUrl, ranks: Ranks) -> None:
        self.run, self.ranks, self.remote, self.copy = run, ranks, run.remote, run.copy
        self.newest: int | None = None
        self.token = ""
        self.sent: dict[str, tuple[int, int]] = {}
        self._together(lambda: (self.copy / CHECKPOINTS).mkdir(parents=True, exist_ok=True))
        status = self.copy.stat()
        place = (socket.gethostname(), status.st_dev, status.st_ino)
        sharing = [rank for rank, its in enumerate(ranks.all_gather(place)) if its == place]
        self.number, self.count = sharing.index(ranks.rank), len(sharing)
        self.leads = self.number == 0

    def begin(self, *, goes_on: bool) -> None:
        """Make the nodes' folders what the URL has, to train on; or empty, to train from the beginning. Collective."""
        if self.ranks.is_first:
            self.token = f"first rank: pid {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
        self._together(lambda: self.remote.write(self.token.encode(), LOCK) if self.ranks.is_first else None)
        if self.leads:
            stage(f"fetching {self.run}")
        self._together(lambda: (self.run.fetch_small() if goes_on else self._clear()) if self.leads else None)
        self.sent = {name: mark for name, mark in self._small_files() if goes_on}

    def _clear(self) -> None:
        """What another run of this URL left, which was deleted there."""
        for path in self.copy.iterdir():
            if path.is_dir() and path.name != "logs":
                shutil.rmtree(path)
            elif path.is_file() and path.name != LOCK:
                path.unlink()
        (self.copy / CHECKPOINTS).mkdir()

    def steps(self) -> list[int]:
        """Of committed checkpoints, in ascending order. Collective."""
        return self._from_first(self.run.steps)

    def has_damaged(self) -> bool:
        """Whether checkpoints were set aside. Collective."""
        return self._from_first(lambda: any(name.endswith(DAMAGED) for name in self.remote.folders(CHECKPOINTS)))

    def _from_first(self, look: Callable[[], T]) -> T:
        found: list[T] = []
        self._together(lambda: found.append(look()) if self.ranks.is_first else None)
        return self.ranks.from_first(lambda: found[0])

    def fetch(self, step: int) -> Path:
        """Make a checkpoint of the URL whole on every node; files that are there already stay. Collective.

        Raises:
            Damaged: a file is missing from the URL or damaged; names it.
        """
        folder = self.copy / CHECKPOINTS / step_name(step)
        self._together(lambda: self.run.fetch_manifest(step) if self.leads else None)
        self._together(lambda: self._fetch_share(folder))
        self.newest = step
        return folder

    def fetch_chosen(self) -> Path:
        """The best checkpoint of a finished run, or the newest of one that goes on. Collective."""
        return self.fetch(self._from_first(lambda: self.run.chosen_step(self.run.steps())))

    def _fetch_share(self, folder: Path) -> None:
        """This rank's of the files that its node lacks."""
        try:
            files: dict[str, Any] = read_manifest(folder)["files"]
        except InputError as error:
            raise type(error)(f"{self.run.url_of(folder / MANIFEST)}: {str(error).partition(': ')[2]}") from error
        own = sorted(files)[self.number :: self.count]
        are_here = at_a_time(lambda name: _is_like(folder / name, files[name]), own)
        lacking = [name for name, is_here in zip(own, are_here, strict=True) if not is_here]
        remote_names = [f"{CHECKPOINTS}/{folder.name}/{name}" for name in lacking]
        for name, size in zip(remote_names, self.remote.sizes(remote_names), strict=True):
            if size is None:
                raise Damaged(f"{self.remote.url_of(name)}: missing from the checkpoint")
            if size != files[name.rpartition("/")[2]]["size"]:
                raise Damaged(f"{self.remote.url_of(name)}: damaged (size or SHA-256 differs from the manifest)")
        at_a_time(lambda name: self._fetch_file(folder / name, files[name]), lacking)

    def _fetch_file(self, path: Path, expected: Mapping[str, Any]) -> None:
        name = path.relative_to(self.copy).as_posix()
        if self.remote.fetch(name, path) != (expected["size"], expected["sha256"]):
            path.unlink()
            raise Damaged(f"{self.remote.url_of(name)}: damaged (size or SHA-256 differs from the manifest)")

    def set_aside(self, step: int) -> None:
        """Take a damaged checkpoint's name away. Collective."""
        name = f"{CHECKPOINTS}/{step_name(step)}"

        def move() -> None:
            self.remote.delete_folder(name + DAMAGED)
            for file in sorted(self.remote.files(name), key=lambda file: not file.endswith(MANIFEST)):
                self.remote.move(file, f"{name}{DAMAGED}/{file.removeprefix(name + '/')}")

        self._together(lambda: move() if self.ranks.is_first else None)
        if self.leads:
            shutil.rmtree(self.copy / name, ignore_errors=True)

    # What follows is called where failures are shared by the caller.

    def make_room(self, step: int) -> None:
        """Before ranks upload a checkpoint. By the first rank.

        Raises:
            TakenOver: another training writes to this URL.
        """
        self._check_alone()
        self.remote.delete_folder(f"{CHECKPOINTS}/{step_name(step)}")

    def upload(self, writing: Path, names: Iterable[str]) -> None:
        """This rank's files of a checkpoint."""
        folder = f"{CHECKPOINTS}/{writing.name.removesuffix(WRITING)}"
        at_a_time(lambda name: self.remote.put(writing / name, f"{folder}/{name}"), list(names))

    def commit(self, step: int, manifest: str) -> None:
        """When all ranks have uploaded: from now on the checkpoint is there. By the first rank."""
        self.upload_small()
        self._check_alone()
        self.remote.write(manifest.encode(), f"{CHECKPOINTS}/{step_name(step)}/{MANIFEST}")

    def amend(self, folder: Path, facts: dict[str, Any]) -> None:
        """As in a node's folder, before that. By the first rank."""
        self.upload_small()
        self._check_alone()
        self.remote.write(signed(read_manifest(folder) | facts).encode(), f"{CHECKPOINTS}/{folder.name}/{MANIFEST}")

    def prune(self, keep: int, best: Sequence[int]) -> None:
        """Delete all but the newest `keep` checkpoints and those of the `best` steps, and what has no manifest. By the first rank."""
        steps = self.run.steps()
        kept = {step_name(step) for step in {*steps[-keep:], *(set(best) & set(steps))}}
        for name in self.remote.folders(CHECKPOINTS):
            if re.fullmatch(r"step_\d+", name) and name not in kept:
                self.remote.delete(f"{CHECKPOINTS}/{name}/{MANIFEST}")  # first: half a checkpoint must never look whole
                self.remote.delete_folder(f"{CHECKPOINTS}/{name}")

    def upload_small(self) -> None:
        """What changed besides checkpoints. By the first rank."""
        changed = [(name, mark) for name, mark in self._small_files() if self.sent.get(name) != mark]
        at_a_time(lambda file: self.remote.put(self.copy / file[0], file[0]), changed)
        self.sent |= dict(changed)

    def _small_files(self) -> list[tuple[str, tuple[int, int]]]:
        """Name, and size and time of change, of each."""
        found = []
        for path in sorted(self.copy.rglob("*")):
            name = path.relative_to(self.copy)
            if name.parts[0] not in OWN and path.is_file() and not path.name.endswith((FETCHING, WRITING)):
                status = path.stat()
                found.append((name.as_posix(), (status.st_size, status.st_mtime_ns)))
        return found

    def _check_alone(self) -> None:
        holder = (self.remote.read(LOCK) or b"").decode(errors="replace")
        steps = self.run.steps()
        if holder != self.token or self.newest != (steps[-1] if steps else None):
            who = holder.rpartition(",")[0] if holder and holder != self.token else "it committed a checkpoint meanwhile"
            raise TakenOver(f"{self.run}: another process trains in this run ({who}); end one of them, or choose another --run")

    def _together(self, work: Callable[[], object]) -> None:
        """Work of any ranks; if it fails on one, all raise what it raised. Collective."""
        failure: InputError | None = None
        try:
            work()
        except InputError as error:
            failure = type(error)(str(error))
        except OSError as error:
            path = error.filename or self.copy
            reason = error.strerror or error
            failure = InputError(f"{path}: cannot keep a copy of {self.run} there ({reason}); choose another folder with {CACHE}")
        failures = [found for found in self.ranks.all_gather(failure) if found is not None]
        # What cannot be reached is no damage.
        for found in sorted(failures, key=lambda found: isinstance(found, Damaged)):
            raise found


def _is_like(path: Path, expected: Mapping[str, Any]) -> bool:
    """Whether a file is here as the manifest has it."""
    stage(f"verifying {path}")
    try:
        return path.stat().st_size == expected["size"] and digest_of(path) == expected["sha256"]
    except OSError:
        return False
