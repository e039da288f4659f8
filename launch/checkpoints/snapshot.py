"""What one rank saves of one moment, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...datasets.durable import sync
from ..faults.stages import stage
from .parts import State, dtype_of, is_sharded, local_parts, shape_of
from .reader import own_name
from .tensor_file import write_tensors

FILE_BYTES = 256 << 20
"""Of one file, unless a single row is larger: several are hashed at a time when they are read."""


class Snapshot(NamedTuple):
    """What one rank saves."""

    tensors: dict[str, torch.Tensor]
    """By key."""
    entries: dict[str, Any]
    """Name to shape, dtype and parts, for the manifest."""

    @classmethod
    def of(cls, state: State, own: Mapping[str, torch.Tensor]) -> Snapshot:
        tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        shared = state.items() if dist.get_rank() == 0 else ((name, value) for name, value in state.items() if is_sharded(value))
        for name, value in (*shared, *((own_name(name), tensor) for name, tensor in own.items())):
            entry = entries.setdefault(name, {"shape": shape_of(value), "dtype": dtype_of(value), "parts": []})
            for part in (piece for whole in local_parts(value) for piece in whole.cut(FILE_BYTES)):
                key = f"{name}@{','.join(map(str, part.offsets))}"
                tensors[key] = part.tensor.detach()
                entry["parts"].append({"key": key, "offsets": part.offsets, "sizes": list(part.tensor.shape)})
        return cls(tensors, entries)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path, rank: int) -> dict[str, Any]:
        """Write this rank's files; returns its entry for the manifest."""
        files: list[dict[str, torch.Tensor]] = [{}]
        for key, tensor in self.tensors.items():
            if files[-1] and sum(held.nbytes for held in files[-1].values()) + tensor.nbytes > FILE_BYTES:
                files.append({})
            files[-1][key] = tensor
        facts: dict[str, Any] = {}
        file_of: dict[str, str] = {}
        synced = []
        with ThreadPoolExecutor(1) as syncing:
            for number, tensors in enumerate(files):
                name = f"rank_{rank}.{number}.safetensors"
                stage(f"writing {folder / name}")
                size, digest = write_tensors(folder / name, tensors)
                synced.append(syncing.submit(_sync, folder / name))
                facts[name] = {"size": size, "sha256": digest}
                file_of |= dict.fromkeys(tensors, name)
            for task in synced:
                task.result()
        entries = {
            name: {**entry, "parts": [{"file": file_of[part["key"]], **part} for part in entry["parts"]]}
            for name, entry in self.entries.items()
        }
        return {"files": facts, "tensors": entries}


def _sync(path: Path) -> None:
    stage(f"syncing {path}")
    sync(path)
