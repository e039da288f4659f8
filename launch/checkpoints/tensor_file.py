"""Named tensors in one safetensors file, written and read in blocks: neither way makes a second copy of a large tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

BLOCK_BYTES = 4 << 20
"""Of one block that is written."""
READ_BYTES = 32 << 20
"""Of one block that is read: larger, because each opens the file."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write a safetensors file and sync it to the disk; returns its size in bytes and its SHA-256.

    The format (https://github.com/huggingface/safetensors): 8 bytes, the header's length; the header, JSON padded with spaces
    to a multiple of 8; the values of all tensors, row-major and little-endian, without gaps.

    Args:
        tensors: on any device, contiguous or not, of any shape.
    """
    assert sys.byteorder == "little", "values are written in the machine's byte order"
    # Wide values first: every tensor then begins at a multiple of its item size, as readers that map the file want.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header, digest = _header(ordered), hashlib.sha256()
    buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(2)]
    at_work: list[list[Future[Any]]] = [[], []]
    # A block is hashed while it is written, and the next one is copied meanwhile.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as hashing:
        file.write(header)
        digest.update(header)
        for number, block in enumerate(block for tensor in ordered.values() for block in _blocks(tensor.detach())):
            for task in at_work[number % 2]:
                task.result()
            content = buffers[number % 2][: block.nbytes]
            content.view(block.dtype).view(block.shape).copy_(block)
            held = content.numpy().data
            at_work[number % 2] = [writing.submit(_write, file, held), hashing.submit(digest.update, held)]
        for task in (*at_work[0], *at_work[1]):
            task.result()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _write(file: FileIO, content: memoryview) -> None:
    """All of it: one call writes less where the disk fills up or a signal comes."""
    while content:
        content = content[file.write(content) :]


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's values in row-major order, as views of at most BLOCK_BYTES."""
    if tensor.nbytes <= BLOCK_BYTES:
        yield tensor
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    for rows in tensor.split(max(1, BLOCK_BYTES * len(tensor) // tensor.nbytes)):
        yield from _blocks(rows if len(rows) > 1 else rows[0])


@torch.no_grad()
def read_region(path: Path, name: str, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Fill `target` with the values of a tensor in a file, from index `offsets` on in every dimension.

    Raises:
        OSError, safetensors.SafetensorError: the file cannot be read, or holds no such tensor.
    """
    if target.dim() == 0:
        with safe_open(path, framework="pt") as file:
            target.copy_(file.get_tensor(name))
        return
    first = 0
    while first < len(target):
        # What is read through the map stays in the process's memory until the file is closed, so each block opens it anew.
        with safe_open(path, framework="pt") as file:
            source = file.get_slice(name)
            row_bytes = math.prod(source.get_shape()[1:]) * target.element_size()
            block = target[first : first + max(1, READ_BYTES // max(1, row_bytes))]
            begins = (offsets[0] + first, *offsets[1:])
            block.copy_(source[tuple(slice(begin, begin + size) for begin, size in zip(begins, block.shape, strict=True))])
        first += len(block)
