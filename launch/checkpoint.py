"""Checkpoints: named tensors, sharded or not, in safetensors files under one manifest. No pickle anywhere.

    checkpoints/step_200/rank_0.safetensors   this rank's shards; rank 0 also holds what all ranks share
                         rank_1.safetensors
                         manifest.json        every tensor's shape and where its parts are; every file's size and SHA-256

A checkpoint is written as `step_200.writing`, synced, and renamed: what has the final name is whole. Loading copies the
parts that overlap what a rank holds now, so any plan on any number of ranks reads any other's checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ..datasets.schema import InputError, Section
from ..embeddings.dynamic.slot_map import RowShard
from ..embeddings.tables import PREFIX
from .tensor_file import read_region, write_tensors

MANIFEST = "manifest.json"
FORMAT = 1
Value = torch.Tensor | ShardedTensor | RowShard
"""Whole on every rank, or in parts: rectangles of a table, or a run of its rows."""
State = Mapping[str, Value]
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class CheckpointSection(Section):
    """`[checkpoint]`."""

    every_steps: PositiveInt = 1000
    keep: PositiveInt = 3
    """Newest checkpoints to keep; the best one is kept besides."""


@dataclass(frozen=True)
class Part:
    """One rectangle of a named tensor: where it begins in the whole, and its values."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.tensor.shape, strict=True))


def local_parts(value: Value) -> list[Part]:
    """The parts of a tensor that this rank holds."""
    if isinstance(value, ShardedTensor):
        return [Part(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
    if isinstance(value, RowShard):
        return [Part((value.first,) + (0,) * (value.tensor.dim() - 1), value.tensor)]
    return [Part((0,) * value.dim(), value)]


def _shape(value: Value) -> list[int]:
    return [value.total, *value.tensor.shape[1:]] if isinstance(value, RowShard) else list(value.size())


def _dtype(value: Value) -> str:
    return str(value.tensor.dtype if isinstance(value, RowShard) else value.dtype).removeprefix("torch.")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_parts(folder: Path, state: State, own: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write this rank's file; return its entry for the manifest."""
    rank = dist.get_rank()
    parts = dict(own)
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        if rank > 0 and not isinstance(value, ShardedTensor | RowShard):
            continue
        entry = tensors.setdefault(name, {"shape": _shape(value), "dtype": _dtype(value), "parts": []})
        for part in local_parts(value):
            key = f"{name}@{','.join(map(str, part.offsets))}"
            parts[key] = part.tensor
            entry["parts"].append({"key": key, "offsets": part.offsets, "sizes": list(part.tensor.shape)})
    file = f"rank_{rank}.safetensors"
    size, digest = write_tensors(folder / file, parts)
    return {"file": file, "size": size, "sha256": digest, "tensors": tensors}


def _manifest(entries: Iterable[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for entry in entries:
        files[entry["file"]] = {"size": entry["size"], "sha256": entry["sha256"]}
        for name, tensor in entry["tensors"].items():
            whole = tensors.setdefault(name, {**tensor, "parts": []})
            whole["parts"] += [{"file": entry["file"], **part} for part in tensor["parts"]]
    content = {"format": FORMAT, **facts, "files": files, "tensors": tensors}
    return {**content, "sha256": _content_digest(content)}


def _other_dtype(name: str, saved: str, now: str) -> str:
    then, now = (_PRECISIONS.get(dtype, dtype) for dtype in (saved, now))
    if table := re.search(rf"\.{PREFIX}([^./@]+)\.weight$", name):
        return (
            f"table '{table[1]}' was saved as {then}, the recipe has {now} ('{name}'); "
            f"set tables.{table[1]}.dtype back, or start another run"
        )
    return f"'{name}' was saved as {then}, the recipe's is {now}; set the dtype back, or start another run"


def _content_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save(folder: Path, state: State, own: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint and commit it. Collective.

    Args:
        folder: final name; exists afterwards, whole, or not at all.
        state: the same names on every rank; what is not sharded is taken from rank 0.
        own: tensors of this rank alone.
        facts: JSON for the manifest: step, reading position.
    """
    writing = folder.with_name(folder.name + ".writing")
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    entry = _write_parts(writing, state, own)
    entries: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(entries, entry)
    if dist.get_rank() == 0:
        manifest = writing / MANIFEST
        manifest.write_text(json.dumps(_manifest(entries, facts)), encoding="utf-8")
        _sync(manifest)
        _sync(writing)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
        _sync(folder.parent)
    dist.barrier()


def committed(checkpoints: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [
        (int(m[1]), path)
        for path in checkpoints.glob("step_*")
        if (m := re.fullmatch(r"step_(\d+)", path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def prune(checkpoints: Path, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and what was never finished."""
    for path in committed(checkpoints)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)
    for path in checkpoints.glob("step_*.writing"):
        shutil.rmtree(path)


class Reader:
    """A committed checkpoint, verified.

    Raises:
        InputError: a file is missing or damaged; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest.pop("sha256") != _content_digest(self.manifest):
                raise InputError(f"{folder / MANIFEST}: damaged (its SHA-256 differs from its content)")
            if self.manifest["format"] != FORMAT:
                raise InputError(f"{folder}: checkpoint format {self.manifest['format']}; this version reads {FORMAT}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / MANIFEST}: not a readable manifest ({error})") from error
        self._verify()

    def _verify(self) -> None:
        """Each rank checks its share of the files; all ranks raise if one finds damage."""
        names = sorted(self.manifest["files"])[dist.get_rank() :: dist.get_world_size()]
        damage = next((problem for name in names if (problem := self._problem(name))), None)
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, damage)
        for problem in problems:
            if problem is not None:
                raise InputError(problem)

    def _problem(self, name: str) -> str | None:
        path, expected = self.folder / name, self.manifest["files"][name]
        if not path.is_file():
            return f"{path}: missing from the checkpoint"
        if path.stat().st_size != expected["size"] or _digest(path) != expected["sha256"]:
            return f"{path}: damaged (size or SHA-256 differs from the manifest)"
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
        path = self.folder / f"rank_{dist.get_rank()}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118

    @torch.no_grad()
    def copy_into(self, name: str, target: Value) -> None:
        """Fill what this rank holds of a tensor.

        Raises:
            InputError: the checkpoint lacks it, or has it in another shape or dtype.
        """
        saved = self.manifest["tensors"].get(name)
        if saved is None:
            raise InputError(f"{self.folder}: holds no '{name}'; the recipe describes another model")
        if saved["shape"] != _shape(target):
            raise InputError(f"{self.folder}: '{name}' has shape {saved['shape']}, the recipe's has {_shape(target)}")
        if saved["dtype"] != _dtype(target):
            raise InputError(f"{self.folder}: {_other_dtype(name, saved['dtype'], _dtype(target))}")
        for part in local_parts(target):
            copied = sum(self._copy_overlap(source, part) for source in saved["parts"])
            assert copied == part.tensor.numel(), f"{name}: {copied} of {part.tensor.numel()} values are in the checkpoint"

    def _copy_overlap(self, source: dict[str, Any], part: Part) -> int:
        """Copy what a saved part and a held part have in common; returns the number of values."""
        source_ends = [o + s for o, s in zip(source["offsets"], source["sizes"], strict=True)]
        low = [max(a, b) for a, b in zip(source["offsets"], part.offsets, strict=True)]
        high = [min(a, b) for a, b in zip(source_ends, part.ends, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return 0
        begin = [a - o for a, o in zip(low, source["offsets"], strict=True)]
        held = part.tensor[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.offsets, strict=True))]
        try:
            read_region(self.folder / source["file"], source["key"], begin, held)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder / source['file']}: cannot be read ({error})") from error
        return held.numel()


def open_newest(checkpoints: Path) -> Iterator[Reader]:
    """Committed checkpoints, newest first; a damaged one is named, set aside as `step_N.damaged`, and passed over. Collective."""
    # One list for all: a rank that lists later would miss what the first has already set aside.
    found: list[Any] = [[folder.name for folder in reversed(committed(checkpoints))]]
    dist.broadcast_object_list(found)
    for folder in (checkpoints / name for name in found[0]):
        try:
            yield Reader(folder)
        except InputError as error:
            if dist.get_rank() == 0:
                print(f"warning: {error}; set aside, trying the checkpoint before it", flush=True)
                aside = folder.with_name(folder.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            dist.barrier()
