"""Committing checkpoints: all ranks' tensors and the facts of one moment become one folder, whole or not at all.

checkpoints/step_200/rank_0.0.safetensors   this rank's parts; rank 0 also holds what all ranks share
                     rank_0.1.safetensors   more of them
                     rank_1.0.safetensors
                     manifest.json
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from pydantic import PositiveInt

from ...datasets.schema import InputError, Section
from ...datasets.storage.access import StorageError
from ...embeddings.memory import free_host_memory
from ..distributed import Ranks
from ..faults.reasons import RankFailure
from ..faults.stages import stage
from .manifest import WRITING, amend, commit, committed, joined, prune, step_name
from .parts import State
from .snapshot import Snapshot
from .tensor_file import bytes_of, is_flat

if TYPE_CHECKING:
    from ..nodes.mirror import Mirror

T = TypeVar("T")
_SPARE = 1.25
"""Free memory, as a multiple of what is copied, below which a checkpoint is written while training waits."""


class CheckpointSection(Section):
    """`[checkpoint]`."""

    every_steps: PositiveInt = 1000
    keep: PositiveInt = 3
    """Newest checkpoints to keep."""
    keep_best: PositiveInt = 1
    """Checkpoints to keep besides: of the best evaluations."""
    background: bool = True
    """Copy what is saved, and write it while training goes on. Needs memory for the copy; where that is short, training waits."""
    start_from: str | None = None
    """A run folder, one of its `checkpoints/step_N`, or a URL of either: a new run begins with what both have in common."""


class Saved(NamedTuple):
    """A checkpoint that was committed."""

    step: int
    bytes: int
    """Of all ranks."""
    stalled_s: float
    """How long the first rank's training stood still for it."""
    written_s: float
    """From the first byte to the commit."""


class Saver:
    """Saves the checkpoints of one run, one at a time.

    Args:
        checkpoints: the folder that holds them; it exists.
        mirror: of a run at a URL: each is brought there before it counts here, where every node has a folder of its own.
    """

    def __init__(self, checkpoints: Path, section: CheckpointSection, ranks: Ranks, mirror: Mirror | None = None) -> None:
        self.checkpoints, self.section, self.ranks, self.mirror = checkpoints, section, ranks, mirror
        self.leads = ranks.is_first if mirror is None else mirror.leads
        self.group = ranks.own_group() if section.background else None
        self.staged: dict[str, torch.Tensor] = {}
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.finished: list[Saved] = []

    def save(self, step: int, state: State, own: Mapping[str, torch.Tensor], facts: dict[str, Any], best: list[int] | None = None) -> None:
        """Save and commit; in the background, unless the recipe or the memory are against it. Collective.

        Args:
            state: the same names on every rank; what is not sharded is taken from rank 0.
            own: tensors of this rank alone.
            facts: JSON for the manifest: reading position, seeds.
            best: steps of the best evaluations, whose checkpoints are kept.
        Raises:
            InputError: it cannot be written; names the path. What was committed before is whole.
        """
        asked = time.monotonic()
        self.wait()
        if self.mirror is not None and self.mirror.newest == step:  # nothing was trained since; while it was replaced there would be none
            self.amend(step, facts, best or [])
            return
        snapshot, facts = Snapshot.of(state, own), {"step": step, **facts}
        if self.section.background and self._has_room(snapshot.tensors):
            stage(f"copying what step {step} saves")
            snapshot = self._copied(snapshot)
            args = (snapshot, facts, best or [], asked, time.monotonic())
            self.thread = threading.Thread(target=self._save, args=args, name="saver", daemon=True)
            self.thread.start()
            return
        self._save(snapshot, facts, best or [], asked, None)
        self._raise()

    def amend(self, step: int, facts: dict[str, Any], best: list[int]) -> None:
        """Replace facts of the newest checkpoint, which is of this very step. Collective.

        Raises:
            InputError: as save.
        """
        self.wait()
        folder, mirror = self.checkpoints / step_name(step), self.mirror
        if mirror is not None:
            self._together(lambda: mirror.amend(folder, facts) if self.ranks.is_first else None, folder)
        self._together(lambda: amend(folder, facts) if self.leads else None, folder)
        self.prune(best)

    def prepare(self, state: State) -> None:
        """Make room for copies of a state, in the background: at the first `save` it would take longer than the copy. Collective."""
        tensors = Snapshot.of(state, {}).tensors
        if self.section.background and self._has_room(tensors):
            self.thread = threading.Thread(target=self._make_room, args=(tensors,), name="saver", daemon=True)
            self.thread.start()

    def _make_room(self, tensors: Mapping[str, torch.Tensor]) -> None:
        torch.set_num_threads(1)
        for key, tensor in tensors.items():
            self.staged[key] = _room_for(tensor).zero_()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            InputError: as save.
        """
        if self.thread is not None:
            stage(f"waiting for the checkpoint that is written to {self.checkpoints}")
            self.thread.join()
            self.thread = None
        self._raise()

    def _raise(self) -> None:
        if self.failure is not None:
            raise self.failure

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written in the background; the next call raises why."""
        return self.failure is not None

    def take_finished(self) -> list[Saved]:
        """Checkpoints that were committed since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def _has_room(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether every node has memory for copies. Collective."""
        missing = sum(tensor.nbytes for key, tensor in tensors.items() if not _like(self.staged.get(key), tensor))
        needs = self.ranks.all_gather((self.ranks.rank // self.ranks.local_world_size, missing, free_host_memory()))
        return all(free >= _SPARE * sum(its_missing for its_node, its_missing, _ in needs if its_node == node) for node, _, free in needs)

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """The same values in memory that training does not touch; it is used again by the next copy."""
        copies = {key: self._room(key, tensor) for key, tensor in snapshot.tensors.items()}
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # one copy is one thread's work
            for _ in threads.map(lambda key: _copy(snapshot.tensors[key], copies[key]), copies):
                pass
        self.staged = copies
        return Snapshot(copies, snapshot.entries)

    def _room(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        held = self.staged.get(key)
        return held if held is not None and _like(held, tensor) else _room_for(tensor)

    def _save(self, snapshot: Snapshot, facts: dict[str, Any], best: list[int], asked: float, went_on: float | None) -> None:
        """Write and commit, or leave in `failure` what went wrong on any rank. Collective.

        Args:
            asked: when training stopped for it.
            went_on: when training did; None if it waits.
        """
        began = time.monotonic()
        try:
            size = self._write_and_commit(snapshot, facts, best)
        except Exception as error:
            self.failure = error
            return
        now = time.monotonic()
        self.finished.append(Saved(facts["step"], size, (went_on or now) - asked, now - began))

    def _write_and_commit(self, snapshot: Snapshot, facts: dict[str, Any], best: list[int]) -> int:
        """Returns the bytes of all ranks."""
        folder = self.checkpoints / step_name(facts["step"])
        writing = folder.with_name(folder.name + WRITING)
        try:
            self._together(lambda: _make_anew(writing) if self.leads else None, writing)
            entry = self._together(lambda: snapshot.write(writing, self.ranks.rank), writing)
            entries = self.ranks.all_gather((entry, snapshot.bytes), self.group)
            text = joined([entry for entry, _ in entries], facts)
            if self.mirror is not None:
                self._bring(self.mirror, writing, entry["files"], facts["step"], text)
            self._together(lambda: commit(writing, folder, text) if self.leads else None, folder)
            self.prune(best)
        except (InputError, RankFailure):
            if self.leads:
                shutil.rmtree(writing, ignore_errors=True)  # where the disk is full, it helps
            raise
        return sum(size for _, size in entries)

    def _bring(self, mirror: Mirror, writing: Path, names: Iterable[str], step: int, manifest: str) -> None:
        """Commit at the URL, before the nodes' folders do: none of them may have what it has not. Collective."""
        is_first = self.ranks.is_first
        self._together(lambda: mirror.make_room(step) if is_first else None, writing)
        self._together(lambda: mirror.upload(writing, names), writing)
        self._together(lambda: mirror.commit(step, manifest) if is_first else None, writing)
        mirror.newest = step

    def prune(self, best: list[int]) -> None:
        """Delete the checkpoints that are not to be kept, and what a kill left half written or half deleted. Collective."""
        keep, mirror = self.section.keep, self.mirror
        if mirror is not None:
            self._together(lambda: mirror.prune(keep, best) if self.ranks.is_first else None, self.checkpoints)
        self._together(lambda: prune(self.checkpoints, keep, best) if self.leads else None, self.checkpoints)

    def _together(self, work: Callable[[], T], path: Path) -> T:
        """What the work makes on this rank. If a file cannot be written on any rank, all raise InputError. Collective."""
        made: T | None = None
        failure: Exception | None = None
        try:
            made = work()
        except OSError as error:
            failure = InputError(f"{error.filename or path}: cannot write the checkpoint ({error.strerror or error})")
        except StorageError as error:
            failure = InputError(str(error))
        except Exception as error:  # the others wait to hear of it
            failure = RankFailure(f"{path}: cannot write the checkpoint ({type(error).__name__}: {error})")
        for found in self.ranks.all_gather(failure, self.group):
            if found is not None:
                raise type(found)(f"{found}; {self._what_is_left()}")
        return cast(T, made)

    def _what_is_left(self) -> str:
        found = committed(self.checkpoints)
        if not found:
            return "no checkpoint was committed before; mend this and start again"
        return f"{found[-1].name} is whole; mend this and go on with --resume"


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # without parents: where storage is gone, its mount point may still be there


def _room_for(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _copy(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    if is_flat(tensor) and is_flat(copy):
        # The C library's copy writes past the caches, as torch's does not: twice as fast.
        np.copyto(bytes_of(copy).numpy(), bytes_of(tensor).numpy())
    else:
        copy.copy_(tensor)


def _like(held: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype
