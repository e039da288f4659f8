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
from safetensors.torch import save_file
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ..datasets.schema import InputError, Section

MANIFEST = "manifest.json"
FORMAT = 1
State = Mapping[str, torch.Tensor | ShardedTensor]


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


def local_parts(value: torch.Tensor | ShardedTensor) -> list[Part]:
    """The parts of a tensor that this rank holds."""
    if isinstance(value, ShardedTensor):
        return [Part(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
    return [Part((0,) * value.dim(), value)]


def _shape(value: torch.Tensor | ShardedTensor) -> list[int]:
    return list(value.size())


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
    parts: dict[str, torch.Tensor] = {}
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        if rank > 0 and not isinstance(value, ShardedTensor):
            continue
        entry = tensors.setdefault(name, {"shape": _shape(value), "dtype": str(value.dtype).removeprefix("torch."), "parts": []})
        for part in local_parts(value):
            key = f"{name}@{','.join(map(str, part.offsets))}"
            parts[key] = part.tensor.detach().contiguous()
            entry["parts"].append({"key": key, "offsets": part.offsets, "sizes": list(part.tensor.shape)})
    for name, value in own.items():
        parts[name] = value.contiguous()
    path = folder / f"rank_{rank}.safetensors"
    save_file({key: part.cpu() for key, part in parts.items()}, path)
    _sync(path)
    return {"file": path.name, "size": path.stat().st_size, "sha256": _digest(path), "tensors": tensors}


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
    def copy_into(self, name: str, target: torch.Tensor | ShardedTensor) -> None:
        """Fill what this rank holds of a tensor.

        Raises:
            InputError: the checkpoint lacks it, or has it in another shape.
        """
        saved = self.manifest["tensors"].get(name)
        if saved is None:
            raise InputError(f"{self.folder}: holds no '{name}'; the recipe describes another model")
        if saved["shape"] != _shape(target):
            raise InputError(f"{self.folder}: '{name}' has shape {saved['shape']}, the recipe's has {_shape(target)}")
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
        try:
            with safe_open(self.folder / source["file"], framework="pt") as file:
                if not low:
                    part.tensor.copy_(file.get_tensor(source["key"]))
                    return 1
                taken = file.get_slice(source["key"])[
                    tuple(slice(a - o, b - o) for a, b, o in zip(low, high, source["offsets"], strict=True))
                ]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder / source['file']}: cannot be read ({error})") from error
        part.tensor[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.offsets, strict=True))].copy_(taken)
        return taken.numel()


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
