"""TorchRec's planner, told of our tables: what each may be, what each part takes, and the same answer in every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel as Kernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Perf, PlannerError, ShardEstimator, ShardingOption, Storage
from torchrec.distributed.types import CacheParams, ShardingPlan

from ..datasets.schema import InputError, Schema
from .memory import Machine, Memory, TableUse, table_uses
from .optimizer import TableTraining
from .tables import PREFIX, EmbeddingTable

_SHARDINGS = ("table_wise", "row_wise", "table_row_wise", "column_wise", "data_parallel")
_GRID_SEARCH = 256
"""Proposals up to which all combinations are tried: three choices each of five tables. TorchRec's own limit takes half a minute."""


@dataclass(frozen=True)
class Request:
    """What a plan is made for, beside the model."""

    sharders: Sequence[Any]
    tables: tuple[EmbeddingTable, ...]
    schema: Schema
    training: TableTraining
    machine: Machine

    @cached_property
    def uses(self) -> dict[str, TableUse]:
        return table_uses(self.tables, self.schema, self.training)

    @property
    def id_maps(self) -> dict[str, int]:
        """{table with dynamic ids: bytes of its map on every rank}."""
        sizes = {name: use.id_map(self.machine.world_size) for name, use in self.uses.items()}
        return {name: size for name, size in sizes.items() if size}

    @property
    def room(self) -> Memory:
        """What the parts of tables may take of a rank."""
        room = self.machine.for_tables
        return Memory(room.host - sum(self.id_maps.values()), room.device)

    def made_for(self) -> dict[str, Any]:
        """As JSON. How much memory there is does not belong to it: whether a plan fits is counted anew."""
        machine = self.machine
        ranks = {"ranks": machine.world_size, "ranks_per_node": machine.local_world_size, "device": machine.device_type}
        keys = ("name", "rows", "dim", "dtype", "sharding", "memory", "cache")
        tables = [{key: getattr(t, key) for key in keys} | {"allowed": allowed(self.uses[t.name], machine)} for t in self.tables]
        return {**ranks, "optimizer": self.training.optimizer, "tables": tables}


def allowed(use: TableUse, machine: Machine) -> list[str]:
    """The shardings among which the planner may choose.

    Raises:
        InputError: the table asks for one that would train another model, or that TorchRec lacks.
    """
    table = use.table
    if table.sharding == "column_wise" and use.training.optimizer == "rowwise_adagrad":
        raise InputError(
            f'table \'{table.name}\': sharding = "column_wise" needs train.embedding_optimizer = "adagrad" or "sgd": '
            "row-wise Adagrad would keep one accumulator a column shard and train another model"
        )
    if use.is_sequence and table.sharding in ("data_parallel", "table_row_wise"):
        raise InputError(
            f"table '{table.name}': sharding = \"{table.sharding}\" is not to be had for a table with an attention feature; "
            "use auto, table_wise, row_wise or column_wise"
        )
    rowless = _leaves_a_rank_without_rows(table, machine)
    if table.sharding in rowless:
        raise InputError(
            f"table '{table.name}': sharding = \"{table.sharding}\" would leave a rank without one of its {table.rows} rows; "
            "use auto or table_wise"
        )
    problem = _not_replicated(use)
    if table.sharding == "data_parallel" and problem:
        raise InputError(f"table '{table.name}': sharding = \"data_parallel\" does not go with {problem}; use auto or another sharding")
    if table.sharding != "auto":
        return [table.sharding]
    choices = ["table_wise", "row_wise"]
    if not use.is_sequence:
        choices += ["table_row_wise"] if machine.world_size > machine.local_world_size else []
        choices += [] if problem else ["data_parallel"]
    return [choice for choice in choices if choice not in rowless]


def _leaves_a_rank_without_rows(table: EmbeddingTable, machine: Machine) -> list[str]:
    """Shardings by rows that FBGEMM cannot look up: without any weights, its CPU kernel takes itself for the GPU's."""
    sharers = {"row_wise": machine.world_size, "table_row_wise": machine.local_world_size}
    return [kind for kind, ranks in sharers.items() if -(-table.rows // ranks) * (ranks - 1) >= table.rows]


def _not_replicated(use: TableUse) -> str | None:
    """Why a table cannot be on every rank: the dense kernel has no such tables, or the dense optimizer would touch all of its rows."""
    if use.table.dtype == "fp16":
        return 'dtype = "fp16"'
    if use.table.memory != "device":
        return f'memory = "{use.table.memory}"'
    if use.training.optimizer == "adam":
        return 'train.embedding_optimizer = "adam", which would move rows that no step looks up'
    if use.training.weight_decay_of(use.table):
        return "weight decay, which would move rows that no step looks up"
    return None


def _constraints(request: Request, choices: Mapping[str, str]) -> dict[str, ParameterConstraints]:
    device, constraints = request.machine.device_type, {}
    for name, use in request.uses.items():
        kernel = use.kernel(device)
        constraints[PREFIX + name] = ParameterConstraints(
            sharding_types=[choices[name]] if name in choices else allowed(use, request.machine),
            compute_kernels=[kernel, Kernel.DENSE.value],
            min_partition=use.column_width if use.table.sharding == "column_wise" else None,
            pooling_factors=use.list_lengths,
            cache_params=cache_params(use.table, kernel),
        )
    return constraints


def cache_params(table: EmbeddingTable, kernel: str) -> CacheParams | None:
    return CacheParams(load_factor=table.cache) if kernel == Kernel.FUSED_UVM_CACHING.value else None


class _Enumerator(EmbeddingEnumerator):
    """TorchRec's options in an order that does not depend on the process: it goes through sets of strings."""

    def enumerate(self, module: nn.Module, sharders: Any) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        return sorted(options, key=lambda option: (option.name, _SHARDINGS.index(option.sharding_type)))


class _MemoryEstimator(ShardEstimator):
    """Our count in place of TorchRec's, which knows nothing of fused optimizers' state and of id maps."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        for option in sharding_options:
            use = self.request.uses[option.name.removeprefix(PREFIX)]
            sizes: dict[tuple[int, int], Storage] = {}
            for shard in option.shards:
                rows, columns = shard.size
                if (rows, columns) not in sizes:
                    share = use.share(self.request.machine, option.sharding_type, option.compute_kernel, 0, (rows, columns), (0, 0))
                    sizes[rows, columns] = Storage(hbm=share.memory.device, ddr=share.memory.host)
                shard.storage = sizes[rows, columns]


class _BalancedMemory(ShardEstimator):
    """A part costs what it takes of a rank: the partitioner, which evens out costs, then evens out memory. Comes after _MemoryEstimator."""

    def __init__(self, topology: Topology, constraints: Any = None) -> None:
        pass

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        for shard in (shard for option in sharding_options for shard in option.shards):
            assert shard.storage is not None
            shard.perf = Perf(fwd_compute=shard.storage.hbm + shard.storage.ddr, fwd_comms=0, bwd_compute=0, bwd_comms=0)


def fast_plan(request: Request, model: nn.Module) -> ShardingPlan | None:
    """The best by TorchRec's estimate of time, among those that it tries and that fit."""
    return _find(request, model, {}, EmbeddingPerfEstimator)


def frugal_plan(request: Request, model: nn.Module) -> ShardingPlan | None:
    """One that fits, if there is one: tables whole or in parts, as memory asks."""
    for choices in _frugal_choices(request):
        if plan := _find(request, model, choices, _BalancedMemory):
            return plan
    return None


def _frugal_choices(request: Request) -> Iterator[dict[str, str]]:
    """{table: sharding} without those that cannot fit: no part may take too much of a rank, and then the less in sum the better."""
    machine, room = request.machine, request.room
    for share in (0.5, 0.1, 0.0):
        limit = Memory(math.floor(share * room.host), math.floor(share * room.device))
        choices, total, fits = {}, Memory(), True
        for name, use in request.uses.items():
            parts = {sharding: use.parts(machine, sharding) for sharding in allowed(use, machine)}
            small = {sharding: part for sharding, part in parts.items() if part.largest.fits(limit)}
            if small:
                choices[name] = min(small, key=lambda sharding, small=small: small[sharding].in_sum.bytes)  # type: ignore[misc]
            else:
                choices[name] = min(parts, key=lambda sharding, parts=parts: parts[sharding].largest.bytes)  # type: ignore[misc]
            part = parts[choices[name]]
            total, fits = total + part.in_sum, fits and part.largest.fits(room)
        if fits and total.fits(Memory(room.host * machine.world_size, room.device * machine.world_size)):
            yield choices


def _find(request: Request, model: nn.Module, choices: Mapping[str, str], costs: type[ShardEstimator]) -> ShardingPlan | None:
    machine, constraints = request.machine, _constraints(request, choices)
    topology = Topology(
        world_size=machine.world_size, local_world_size=machine.local_world_size, compute_device=machine.device_type,
        hbm_cap=request.room.device, ddr_cap=request.room.host,
    )  # fmt: skip
    batch_size = request.schema.data.batch_size
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=_Enumerator(topology, batch_size, constraints, [_MemoryEstimator(request), costs(topology, constraints)]),
        storage_reservation=FixedPercentageStorageReservation(0.0),  # the room is what is left; TorchRec reserves on GPUs only
        proposer=[GridSearchProposer(_GRID_SEARCH), GreedyProposer(), GreedyProposer(use_depth=False)],
        stats=[],
        debug=False,
    )
    try:
        return planner.plan(model, list(request.sharders))
    except PlannerError:
        return None
