"""Named tensors in one safetensors file, written and read in blocks: neither way makes a second copy of a large tensor."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import mmap
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
_SECTOR = 4096
"""Bytes, of which a write past the page cache takes whole numbers."""

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
    scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    with _HashedFile(path) as file:
        file.write(torch.frombuffer(bytearray(_header(ordered)), dtype=torch.uint8))
        for tensor in ordered.values():
            for block in _blocks(tensor.detach()):
                file.write(bytes_of(block if is_flat(block) else _flat(block, scratch)))
        return file.end()


class _HashedFile:
    """A file that is written from its beginning to its end and hashed on the way, past the page cache where the file system can do that.

    The cache would cost the processor more than the hash does, and drive out what training reads.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.file = FileIO(path, "wb", opener=_open_direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.file = FileIO(path, "wb")
        size = -(-BLOCK_BYTES // _SECTOR) * _SECTOR
        self.buffers = [torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) for _ in range(2)]  # memory begins at a page, as it must
        self.at_work: list[list[Future[Any]]] = [[], []]
        self.writing, self.hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.digest, self.size, self.filled = hashlib.sha256(), 0, 0

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.writing.shutdown()
        self.hashing.shutdown()
        self.file.close()

    def write(self, content: torch.Tensor) -> None:
        """Bytes, uint8."""
        while len(content):
            buffer = self.buffers[0]
            taken = content[: len(buffer) - self.filled]
            buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            content = content[len(taken) :]
            if self.filled == len(buffer):
                self._hand_over()

    def end(self) -> tuple[int, str]:
        """The file's size, and its SHA-256."""
        self._hand_over()
        self._wait(0)
        self._wait(1)
        os.ftruncate(self.file.fileno(), self.size)
        return self.size, self.digest.hexdigest()

    def _hand_over(self) -> None:
        """Write and hash what the first buffer holds, and fill the other one meanwhile."""
        held, whole_sectors = self.buffers[0][: self.filled], -(-self.filled // _SECTOR) * _SECTOR
        self.at_work[0] = [
            self.writing.submit(_write, self.file, self.buffers[0][:whole_sectors].numpy().data),
            self.hashing.submit(self.digest.update, held.numpy().data),
        ]
        self.size, self.filled = self.size + self.filled, 0
        self.buffers.reverse()
        self.at_work.reverse()
        self._wait(0)

    def _wait(self, buffer: int) -> None:
        for task in self.at_work[buffer]:
            task.result()


def _open_direct(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_DIRECT, 0o666)


def _write(file: FileIO, content: memoryview) -> None:
    """All of it: one call writes less where the disk fills up or a signal comes."""
    while content:
        try:
            content = content[file.write(content) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not leave_direct(file):
                raise


def leave_direct(file: FileIO) -> bool:
    """Go on through the page cache, which takes what does not begin or end at a sector; False if that is so already."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)


def is_flat(tensor: torch.Tensor) -> bool:
    """Its values lie in memory as they do in a file. A tensor of one value may be contiguous with any stride."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.view(-1).stride() == (1,)


def _flat(block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    held = scratch[: block.nbytes].view(block.dtype)
    held.view(block.shape).copy_(block)
    return held


def bytes_of(flat: torch.Tensor) -> torch.Tensor:
    """uint8, sharing the memory of a flat tensor."""
    return flat.view(-1).view(torch.uint8)


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
        if target.shape[1:] == place.shape[1:] and is_flat(target):
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
    free = bytes_of(target).numpy().data
    while free:
        read = os.preadv(file.fileno(), [free[:MOST_BYTES_A_READ]], begin)
        if read == 0:
            raise ValueError("ends too early")
        free, begin = free[read:], begin + read
