"""Tables that do not fit: who needs how much, and what would fit, each tried before it is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from .memory import MEMORY_RESERVED, Machine
from .tables import EmbeddingTable, meta_collections

if TYPE_CHECKING:
    from .plan import Plan
    from .planner import Request

    Attempt = Callable[[Request, nn.Module], Plan | None]

Kind = Literal["host", "device"]
UNLIMITED = 1 << 60
MAX_RANKS = 1024
MIN_DIM = 4


def size_text(size: float) -> str:
    """Bytes for people: `9.1 GiB`."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**exponent:
            return f"{size / 2**exponent:.1f} {unit}"
    return f"{size:.0f} bytes"


def round_up(size: float) -> int:
    """To a tenth of the unit that `size_text` gives it."""
    for exponent in (30, 20, 10):
        if size >= 2**exponent:
            return math.ceil(math.ceil(size / 2**exponent * 10) / 10 * 2**exponent)
    return math.ceil(size)


def refusal(request: Request, attempt: Attempt) -> str:
    """The line that says so. `attempt` plans in the way that takes least, or gives None."""
    question = _Question(request, attempt)
    short = question.short_of()
    machine, plan = question.least_memory(short)
    kind = short[0]
    needs = [getattr(need, kind) for need in plan.needs()]
    rank = needs.index(max(needs))
    table, its_need = max(_by_table(plan, rank, kind).items(), key=lambda item: item[1])
    has = getattr(request.machine, f"{kind}_memory")
    more = " and ".join(_of_kind(machine, short_kind) for short_kind in short)
    ways = [*question.more_ranks(), f"with {more} a rank", *question.smaller_tables(kind)]
    return (
        f"the tables do not fit {_ranks(request.machine)} with {_of_kind(request.machine, kind)} each, of which tables may take "
        f"{size_text(has * (1 - MEMORY_RESERVED))}: rank {rank} needs {size_text(needs[rank])} (table '{table}' {size_text(its_need)}); "
        f"it fits {', '.join(ways[:-1])}{', or ' if len(ways) > 1 else ''}{ways[-1]}"
    )


def _of_kind(machine: Machine, kind: Kind) -> str:
    of = {"device": " of GPU memory", "host": " of host memory"}[kind] if machine.device_type == "cuda" else ""
    return size_text(getattr(machine, f"{kind}_memory")) + of


def _with_memory(machine: Machine, kind: Kind, size: int) -> Machine:
    return replace(machine, device_memory=size) if kind == "device" else replace(machine, host_memory=size)


def _ranks(machine: Machine) -> str:
    return f"{machine.world_size} rank{'s' if machine.world_size > 1 else ''}"


def _by_table(plan: Plan, rank: int, kind: Kind) -> dict[str, int]:
    sizes = dict(plan.id_maps) if kind == "host" else {}
    for share in plan.on(rank):
        sizes[share.table] = sizes.get(share.table, 0) + getattr(share.memory, kind)
    return sizes


@dataclass(frozen=True)
class _Question:
    request: Request
    attempt: Attempt

    def on(self, machine: Machine) -> Plan | None:
        return self.with_tables(self.request.tables, machine)

    def with_tables(self, tables: tuple[EmbeddingTable, ...], machine: Machine | None = None) -> Plan | None:
        request = replace(self.request, tables=tables, machine=machine or self.request.machine)
        collections = meta_collections(tables, request.schema)
        return self.attempt(request, nn.ModuleList(c for c in collections if c is not None))

    def short_of(self) -> tuple[Kind, ...]:
        """Which memory does not suffice even if there were no end of the other."""
        machine = self.request.machine
        if machine.device_type == "cpu":
            return ("host",)
        device = self.on(replace(machine, host_memory=UNLIMITED)) is None
        host = self.on(replace(machine, device_memory=UNLIMITED)) is None
        kinds: dict[Kind, bool] = {"device": device, "host": host}
        return tuple(kind for kind, is_short in kinds.items() if is_short) or ("device", "host")

    def least_memory(self, short: tuple[Kind, ...]) -> tuple[Machine, Plan]:
        """The least that suffices, of what there is too little of, to about 2 %."""
        machine = self.request.machine
        for kind in short:
            machine = _with_memory(machine, kind, UNLIMITED)
        plan = self.on(machine)
        assert plan is not None, "with unlimited memory everything fits"
        for kind in short:
            too_little, enough = getattr(self.request.machine, f"{kind}_memory"), self._enough(plan, kind)
            tried = enough
            while enough - too_little > 0.02 * enough:
                found = self.on(_with_memory(machine, kind, tried))
                if found is None:
                    too_little = tried
                else:
                    plan, enough = found, min(tried, self._enough(found, kind))
                tried = round_up((too_little + enough) / 2)
                if tried >= enough:
                    break
            machine = _with_memory(machine, kind, enough)
        return machine, plan

    def _enough(self, plan: Plan, kind: Kind) -> int:
        need = max(getattr(need, kind) for need in plan.needs())
        return round_up(need / (1 - MEMORY_RESERVED) + 1)

    def more_ranks(self) -> Iterator[str]:
        """Ranks of the same kind, on more nodes of the same kind."""
        machine = self.request.machine
        while machine.world_size * 2 <= MAX_RANKS:
            machine = replace(machine, world_size=machine.world_size * 2)
            if self._might_fit(machine) and self.on(machine) is not None:
                yield f"with {machine.world_size} ranks on {machine.world_size // machine.local_world_size} nodes"
                return

    def _might_fit(self, machine: Machine) -> bool:
        """Whether weights and optimizer state are less than all there is: planning for many ranks takes seconds."""
        room = machine.for_tables
        sizes = (t.rows * t.dim * use.element_size for t in self.request.tables for use in [self.request.uses[t.name]])
        return sum(sizes) <= (room.host + room.device) * machine.world_size

    def smaller_tables(self, kind: Kind) -> Iterator[str]:
        """The largest table narrower, in half precision, or in host memory."""
        tables, on_gpu = self.request.tables, self.request.machine.device_type == "cuda"
        there = [t for t in tables if not on_gpu or (t.memory == "device") == (kind == "device")] or list(tables)
        largest = max(there, key=lambda t: t.rows * t.dim * self.request.uses[t.name].element_size)
        dim = largest.dim
        while dim > MIN_DIM:
            dim = max(MIN_DIM, dim // 2 // 4 * 4)
            if self._changed(largest, dim=dim):
                yield f"with dim {dim} for table '{largest.name}' ({largest.dim} now)"
                break
        if largest.dtype == "fp32" and largest.sharding != "data_parallel" and self._changed(largest, dtype="fp16"):
            yield f"with dtype = \"fp16\" for table '{largest.name}'"
        if on_gpu and largest.memory == "device" and largest.sharding != "data_parallel" and self._changed(largest, memory="uvm"):
            yield f"with memory = \"uvm\" for table '{largest.name}'"

    def _changed(self, table: EmbeddingTable, **update: object) -> bool:
        changed = tuple(t.model_copy(update=update) if t is table else t for t in self.request.tables)
        return self.with_tables(changed) is not None
