"""What a rank has, and what each part of a table takes of it: weights, optimizer state, activations, cache, id map."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..datasets.schema import Feature, InputError, Schema
from .control_groups import memory_limits
from .optimizer import TableTraining
from .tables import EmbeddingTable, is_sequence_table

DeviceType = Literal["cpu", "cuda"]
MEMORY_RESERVED = 0.2
"""Share of a rank's memory that is left to batches, dense weights and what exchanges take."""
LIST_LENGTH = 20
"""Ids expected in a list without `max_length`."""
ID_MAP_BYTES, WAITING_BYTES = 16, 16
"""A row of a table with ids = "dynamic", in host memory: its id, and with min_count above 1 a place to wait in."""
_STATE_BYTES = {"rowwise_adagrad": (0, 4), "adagrad": (4, 0), "sgd": (0, 0), "adam": (8, 0)}
"""Optimizer state in fp32: bytes an element, and bytes a row."""
_CACHE_BYTES_A_ROW, _CACHE_BYTES_A_SLOT = 4, 16
"""FBGEMM's cache beside the cached rows: where each row is cached; for each slot which row, and when it was used."""


@dataclass(frozen=True)
class Machine:
    """The ranks that tables are spread over, all alike. Bytes a rank."""

    device_type: DeviceType
    world_size: int
    local_world_size: int
    """Ranks on each node."""
    host_memory: int
    device_memory: int | None = None
    """None on CPU, where everything is in host memory."""

    @property
    def for_tables(self) -> Memory:
        """What a rank's tables may take."""
        host, device = (math.floor(size * (1 - MEMORY_RESERVED)) for size in (self.host_memory, self.device_memory or 0))
        return Memory(host, device)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by where they lie."""

    host: int = 0
    device: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.host + other.host, self.device + other.device)

    @property
    def bytes(self) -> int:
        return self.host + self.device

    def fits(self, room: Memory) -> bool:
        return self.host <= room.host and self.device <= room.device


@dataclass(frozen=True)
class Share:
    """One part of a table on one rank. A replicated table has one on every rank."""

    table: str
    sharding: str
    kernel: str
    rank: int
    rows: int
    columns: int
    row_offset: int
    column_offset: int
    weights: int
    """Bytes, as all below."""
    optimizer: int
    activations: int
    """Of one step: ids, vectors and their gradients; the gradient of the whole table where it is replicated."""
    cache: int
    """memory = "uvm_caching": the part of the rows in GPU memory."""
    memory: Memory
    """All of it, by where it lies."""


class Parts(NamedTuple):
    """What a sharding makes of a table."""

    largest: Memory
    in_sum: Memory


@dataclass(frozen=True)
class TableUse:
    """What the recipe does with a table, as far as memory goes."""

    table: EmbeddingTable
    training: TableTraining
    features: tuple[Feature, ...]
    is_sequence: bool
    """One vector an id, not one a row."""
    batch_size: int

    @property
    def list_lengths(self) -> list[float]:
        """Ids expected in a row, for each feature."""
        return [1.0 if f.kind == "id" else float(f.max_length or LIST_LENGTH) for f in self.features]

    def share(self, machine: Machine, sharding: str, kernel: str, rank: int, size: tuple[int, int], offset: tuple[int, int]) -> Share:
        """The bytes of a part. Ids are taken to fall evenly on the rows."""
        rows, columns = size
        elements = rows * columns
        a_element, a_row = _STATE_BYTES[self.training.optimizer]
        weights, state = elements * self.element_size, elements * a_element + rows * a_row
        cached = self.table.cache * rows if kernel == "fused_uvm_caching" else 0.0
        cache = math.ceil(cached * (columns * self.element_size + _CACHE_BYTES_A_SLOT)) + (rows * _CACHE_BYTES_A_ROW if cached else 0)
        activations = self._activations(machine, sharding, rows, columns)
        if machine.device_type == "cpu":
            memory = Memory(host=weights + state + activations)
        elif "uvm" in kernel:
            memory = Memory(host=weights + state, device=activations + cache)
        else:
            memory = Memory(device=weights + state + activations)
        return Share(self.table.name, sharding, kernel, rank, rows, columns, *offset, weights, state, activations, cache, memory)

    def parts(self, machine: Machine, sharding: str) -> Parts:
        """Memory of the parts, where all are as large as the largest."""
        rows, dim = self.table.rows, self.table.dim
        counts = {"row_wise": machine.world_size, "table_row_wise": machine.local_world_size, "data_parallel": machine.world_size}
        count = math.ceil(dim / self.column_width) if sharding == "column_wise" else counts.get(sharding, 1)
        size = (math.ceil(rows / count) if sharding.endswith("row_wise") else rows, self.column_width if sharding == "column_wise" else dim)
        memory = self.share(machine, sharding, self.kernel(machine.device_type), 0, size, (0, 0)).memory
        return Parts(memory, Memory(memory.host * count, memory.device * count))

    def kernel(self, device_type: DeviceType) -> str:
        """FBGEMM's, where the table is not replicated. On CPU all memory is the host's."""
        kernels = {"device": "fused", "uvm": "fused_uvm", "uvm_caching": "fused_uvm_caching"}
        return kernels[self.table.memory] if device_type == "cuda" else "fused"

    @property
    def column_width(self) -> int:
        """Of column-wise parts: half the table's, so that two ranks share it."""
        return max(4, self.table.dim // 2 // 4 * 4)

    @property
    def element_size(self) -> int:
        return 2 if self.table.dtype == "fp16" else 4

    def _activations(self, machine: Machine, sharding: str, rows: int, columns: int) -> int:
        if rows == 0:
            return 0
        replicated = sharding == "data_parallel"
        batches = 1 if replicated else machine.world_size  # a part serves the rows of all ranks
        num_ids = sum(self.list_lengths) * self.batch_size * batches * (1.0 if replicated else rows / self.table.rows)
        num_vectors = num_ids if self.is_sequence else len(self.features) * self.batch_size * batches
        gradient_of_table = rows * columns * self.element_size if replicated else 0
        return math.ceil(num_ids * 8 + num_vectors * columns * 4 * 2) + gradient_of_table

    def id_map(self, world_size: int) -> int:
        """Bytes of a rank's part of the id map: the rows are split evenly, whatever the sharding."""
        if self.table.ids != "dynamic":
            return 0
        return math.ceil(self.table.rows / world_size) * (ID_MAP_BYTES + (WAITING_BYTES if self.table.min_count > 1 else 0))


def table_uses(tables: tuple[EmbeddingTable, ...], schema: Schema, training: TableTraining) -> dict[str, TableUse]:
    """{table: its use}."""
    return {
        table.name: TableUse(
            table=table,
            training=training,
            features=tuple(f for f in schema.features if f.table == table.name),
            is_sequence=is_sequence_table(table.name, schema),
            batch_size=schema.data.batch_size,
        )
        for table in tables
    }


def this_machine(
    device_type: DeviceType,
    world_size: int,
    local_world_size: int,
    *,
    host_memory: int | None = None,
    device_memory: int | None = None,
) -> Machine:
    """Ranks on nodes like this one, which its ranks share evenly. Bytes a rank that are given are not looked for.

    Raises:
        InputError: there is no GPU to ask for its memory.
    """
    if host_memory is None:
        host_memory = _host_memory() // local_world_size
    if device_type == "cuda" and device_memory is None:
        if not torch.cuda.is_available():
            raise InputError("there is no GPU here to plan for; give its memory in GiB with --memory, or --device cpu")
        devices = range(min(local_world_size, torch.cuda.device_count()))
        device_memory = min(torch.cuda.get_device_properties(i).total_memory for i in devices)
    return Machine(device_type, world_size, local_world_size, host_memory, device_memory)


def _host_memory() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(group.limit for group in memory_limits())])


def free_host_memory() -> int:
    """Bytes that could be taken without swapping, or meeting a limit of a control group."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return max(0, min([free, *(group.limit - group.held for group in memory_limits())]))
