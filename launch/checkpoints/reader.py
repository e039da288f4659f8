"""Reading checkpoints: verified whole before a tensor is used, then copied part by part into any plan on any number of ranks."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ...datasets.schema import InputError
from ...embeddings.control_groups import num_cores
from ...embeddings.tables import PREFIX
from ..faults.stages import stage
from .manifest import DAMAGED, Damaged, committed, read_manifest, step_name, step_of
from .parts import Part, Value, dtype_of, local_parts, shape_of
from .tensor_file import read_region

if TYPE_CHECKING:
    from ..nodes.mirror import Mirror

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_BLOCK_BYTES = 4 << 20
CONVERTED_BYTES = 32 << 20
"""Held at a time of what is read in another dtype than it was saved."""


class Reader:
    """A committed checkpoint, verified. Collective.

    Raises:
        Damaged: a file is missing or damaged; names it.
        InputError: one cannot be read, or is of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = {}
        stage(f"verifying {folder}")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._problem())
        problems = [problem for problem in found if problem is not None]
        # What a rank cannot read is no damage: its node may lack the storage.
        for problem in sorted(problems, key=lambda problem: isinstance(problem, Damaged)):
            raise problem

    def _problem(self) -> InputError | None:
        """What is wrong with the manifest, or with this rank's share of the files."""
        try:
            self.manifest = read_manifest(self.folder)
        except InputError as error:
            return type(error)(str(error))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        names = sorted(self.manifest["files"])[rank::world_size]
        with ThreadPoolExecutor(max(2, 2 * num_cores() // world_size)) as threads:  # half of them wait for the disk
            return next((problem for problem in threads.map(self._problem_of, names) if problem), None)

    def _problem_of(self, name: str) -> InputError | None:
        path, expected = self.folder / name, self.manifest["files"][name]
        stage(f"verifying {path}")
        try:
            if path.stat().st_size != expected["size"] or digest_of(path) != expected["sha256"]:
                return Damaged(f"{path}: damaged (size or SHA-256 differs from the manifest)")
        except FileNotFoundError:
            return Damaged(f"{path}: missing from the checkpoint")
        except OSError as error:
            return InputError(f"{path}: cannot be read ({error.strerror})")
        return None

    def names(self) -> set[str]:
        return set(self.manifest["tensors"])

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU."""
        saved = self.manifest["tensors"][name]
        whole = torch.empty(saved["shape"], dtype=getattr(torch, saved["dtype"]))
        self.copy_into(name, whole)
        return whole

    def read_own(self, name: str) -> torch.Tensor | None:
        """A tensor that this rank alone saved, or None if there is none."""
        own = own_name(name)
        return self.read(own) if own in self.manifest["tensors"] else None

    @torch.no_grad()
    def copy_into(self, name: str, target: Value) -> None:
        """Fill what this rank holds of a tensor.

        Raises:
            InputError: the checkpoint lacks it, or has it in another shape or dtype.
        """
        saved = self.manifest["tensors"].get(name)
        if saved is None:
            raise InputError(f"{self.folder}: holds no '{name}'; the recipe describes another model")
        if saved["shape"] != shape_of(target):
            raise InputError(f"{self.folder}: '{name}' has shape {saved['shape']}, the recipe's has {shape_of(target)}")
        if saved["dtype"] != dtype_of(target):
            raise InputError(f"{self.folder}: {_other_dtype(name, saved['dtype'], dtype_of(target))}")
        for part in local_parts(target):
            self.read_part(name, part)

    @torch.no_grad()
    def read_part(self, name: str, part: Part) -> None:
        """Fill a rectangle that lies within a saved tensor, in whatever dtype it was saved."""
        saved = self.manifest["tensors"][name]
        dtype = getattr(torch, saved["dtype"])
        is_same = part.tensor.dtype == dtype
        for piece in [part] if is_same else part.cut(CONVERTED_BYTES):
            held = piece if is_same else Part(piece.offsets, torch.empty(piece.tensor.shape, dtype=dtype))
            copied = sum(self._copy_overlap(source, held) for source in saved["parts"])
            assert copied == held.tensor.numel(), f"{name}: {copied} of {held.tensor.numel()} values are in the checkpoint"
            if not is_same:
                piece.tensor.copy_(held.tensor)

    def _copy_overlap(self, source: dict[str, Any], part: Part) -> int:
        """Copy what a saved part and a held part have in common; returns the number of values."""
        source_ends = [o + s for o, s in zip(source["offsets"], source["sizes"], strict=True)]
        low = [max(a, b) for a, b in zip(source["offsets"], part.offsets, strict=True)]
        high = [min(a, b) for a, b in zip(source_ends, part.ends, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return 0
        begin = [a - o for a, o in zip(low, source["offsets"], strict=True)]
        held = part.tensor[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.offsets, strict=True))]
        path = self.folder / source["file"]
        stage(f"reading {path}")
        try:
            read_region(path, source["key"], begin, held)
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        return held.numel()


def own_name(name: str) -> str:
    """What a rank saves for itself alone, among the names of all."""
    return f"rank_{dist.get_rank()}/{name}"


def open_newest(checkpoints: Path, mirror: Mirror | None = None) -> Iterator[Reader]:
    """Committed checkpoints, newest first; a damaged one is named, set aside as `step_N.damaged`, and passed over. Collective.

    Args:
        mirror: of a run at a URL: what is there counts, and is fetched.
    Raises:
        InputError: one cannot be read, though it may be whole; or there were some, and none is whole.
    """
    # One list for all: a rank that lists later would miss what the first has already set aside.
    if mirror is None:
        steps, is_damaged = [step_of(folder) for folder in committed(checkpoints)], any(checkpoints.glob(f"step_*{DAMAGED}"))
    else:
        steps, is_damaged = mirror.steps(), mirror.has_damaged()
    found: list[Any] = [steps[::-1], is_damaged]
    dist.broadcast_object_list(found)
    for step in found[0]:
        folder = checkpoints / step_name(step)
        try:
            if mirror is not None:
                mirror.fetch(step)
            yield Reader(folder)
        except Damaged as error:
            if dist.get_rank() == 0:
                print(f"warning: {error}; set aside, trying the checkpoint before it", flush=True)
            if mirror is not None:
                mirror.set_aside(step)
            elif dist.get_rank() == 0:
                aside = folder.with_name(folder.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            dist.barrier()
    if any(found):
        where = checkpoints if mirror is None else mirror.run.url_of(checkpoints)
        raise InputError(f"{where}: no checkpoint in it is whole; restore one, or start another run")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return digest.hexdigest()


def _other_dtype(name: str, saved: str, now: str) -> str:
    then, now = (_PRECISIONS.get(dtype, dtype) for dtype in (saved, now))
    if table := re.search(rf"\.{PREFIX}([^./@]+)\.weight$", name):
        return (
            f"table '{table[1]}' was saved as {then}, the recipe has {now} ('{name}'); "
            f"set tables.{table[1]}.dtype back, or start another run"
        )
    return f"'{name}' was saved as {then}, the recipe's is {now}; set the dtype back, or start another run"
