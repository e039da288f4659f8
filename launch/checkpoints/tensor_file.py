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
from typing import Any, NamedTuple

import torch

BLOCK_BYTES = 4 << 20
"""Of one block that is written."""
READ_BYTES = 4 << 20
"""Of one block that is read, where a target does not take the values as they lie in the file."""
MOST_BYTES_A_READ = 1 << 30

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
    """Write a safetensors file; returns its size in bytes and its SHA-256.

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
            held = _content(block, buffers[number % 2])
            at_work[number % 2] = [writing.submit(_write, file, held), hashing.submit(digest.update, held)]
        for task in (*at_work[0], *at_work[1]):
            task.result()
        return file.tell(), digest.hexdigest()


def _content(block: torch.Tensor, buffer: torch.Tensor) -> memoryview:
    """The block's values as they go into the file; copied into the buffer if they lie otherwise."""
    if _is_flat(block):
        return _memory(block)
    held = buffer[: block.nbytes].view(block.dtype)
    held.view(block.shape).copy_(block)
    return _memory(held)


def _is_flat(tensor: torch.Tensor) -> bool:
    """Its values lie in memory as they do in a file. A tensor of one value may be contiguous with any stride."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.view(-1).stride() == (1,)


def _memory(flat: torch.Tensor) -> memoryview:
    return flat.view(-1).view(torch.uint8).numpy().data


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


class Place(NamedTuple):
    """Where a tensor's values are in a file."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _place(file: FileIO, name: str) -> Place:
    try:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        dtype = next(dtype for dtype, code in _DTYPES.items() if code == entry["dtype"])
        return Place(8 + size + int(entry["data_offsets"][0]), dtype, tuple(entry["shape"]))
    except (ValueError, KeyError, TypeError, StopIteration, OverflowError, MemoryError) as error:
        raise ValueError(f"holds no tensor '{name}'") from error


@torch.no_grad()
def read_region(path: Path, name: str, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Fill `target` with the values of a tensor in a file, from index `offsets` on in every dimension.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such tensor, or ends before it.
    """
    with path.open("rb", buffering=0) as file:
        place = _place(file, name)
        assert place.dtype == target.dtype and len(place.shape) == target.dim(), (place, target.shape, target.dtype)
        if target.numel() == 0:
            return
        if target.dim() == 0:
            target, place, offsets = target.view(1), place._replace(shape=(1,)), (0,)
        row_bytes = math.prod(place.shape[1:]) * target.element_size()
        first_byte = place.begin + offsets[0] * row_bytes
        if target.shape[1:] == place.shape[1:] and _is_flat(target):
            _read(file, first_byte, target)
            return
        columns = tuple(slice(begin, begin + size) for begin, size in zip(offsets[1:], target.shape[1:], strict=True))
        rows = max(1, READ_BYTES // max(1, row_bytes))
        buffer = torch.empty(min(rows, len(target)), *place.shape[1:], dtype=target.dtype)
        for first in range(0, len(target), rows):
            held = target[first : first + rows]
            block = buffer[: len(held)]
            _read(file, first_byte + first * row_bytes, block)
            held.copy_(block[(slice(None), *columns)])


def _read(file: FileIO, begin: int, target: torch.Tensor) -> None:
    """The bytes of a file from `begin` on become the values of a flat tensor."""
    free = _memory(target)
    while free:
        read = os.preadv(file.fileno(), [free[:MOST_BYTES_A_READ]], begin)
        if read == 0:
            raise ValueError("ends too early")
        free, begin = free[read:], begin + read
