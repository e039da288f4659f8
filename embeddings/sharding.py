"""Which rank holds which part of which table: sharder, constraints, topology, planner, DistributedModelParallel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan, ShardingType

from ..datasets.schema import InputError
from .optimizer import TableOptimizer, fused_params
from .tables import PREFIX, EmbeddingTable, fill_table

MEMORY_RESERVED = 0.2
"""Share of a rank's memory that the planner leaves to batches, activations and dense weights."""


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with row-wise sharding on CPU too: gloo serves it, only the stock list leaves it out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(dict.fromkeys([*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value]))


def _allowed(table: EmbeddingTable, optimizer: TableOptimizer) -> list[str]:
    if table.sharding == "column_wise" and optimizer == "rowwise_adagrad":
        raise InputError(
            f'table \'{table.name}\': sharding = "column_wise" needs train.embedding_optimizer = "adagrad" or "sgd": '
            "row-wise Adagrad would keep one accumulator a column shard and train another model"
        )
    if table.sharding != "auto":
        return [table.sharding]
    return ["table_wise", "row_wise", "data_parallel"]


def constraints(tables: Sequence[EmbeddingTable], optimizer: TableOptimizer) -> dict[str, ParameterConstraints]:
    return {
        PREFIX + table.name: ParameterConstraints(
            sharding_types=_allowed(table, optimizer),
            # Tables in the device's own memory: on CUDA the planner could also choose UVM, caches and SSD.
            compute_kernels=[EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value],
            # Half the width, so that two ranks share a column-wise table.
            min_partition=max(4, table.dim // 2 // 4 * 4) if table.sharding == "column_wise" else None,
        )
        for table in tables
    }


def topology(device: torch.device, world_size: int, local_world_size: int) -> Topology:
    """What this machine has, split evenly among its ranks; TorchRec's default is a V100 host."""
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size
    device_memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Topology(
        world_size=world_size, local_world_size=local_world_size, compute_device=device.type, hbm_cap=device_memory, ddr_cap=host_memory
    )


def shard(
    model: nn.Module,
    tables: Sequence[EmbeddingTable],
    *,
    device: torch.device,
    local_world_size: int,
    batch_size: int,
    optimizer: TableOptimizer,
    lr: float,
    eps: float,
    seed: int,
) -> DistributedModelParallel:
    """Plan, shard and initialise a model whose tables are on meta. Collective: every rank calls it.

    The initial table weights depend on `seed` alone, not on the plan; the dense weights of rank 0 go to all ranks.

    Raises:
        InputError: the tables do not fit, or a table's sharding contradicts its optimizer.
    """
    sharder = Sharder(fused_params=fused_params(optimizer, lr, eps))
    planner = EmbeddingShardingPlanner(
        topology=topology(device, dist.get_world_size(), local_world_size),
        batch_size=batch_size,
        constraints=constraints(tables, optimizer),
        storage_reservation=FixedPercentageStorageReservation(MEMORY_RESERVED),
    )
    try:
        plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    except PlannerError as error:
        gibibytes = sum(table.rows * table.dim * 4 for table in tables) / 2**30
        raise InputError(
            f"no sharding plan fits: tables of {gibibytes:.2f} GiB (weights alone) over {dist.get_world_size()} ranks; "
            'use more ranks, fewer rows, a smaller dim, or sharding = "auto"'
        ) from error
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])
    weights = table_weights(sharded)
    for table in tables:
        fill_table(weights[table.name], table, seed)
    return sharded


def table_weights(model: nn.Module) -> dict[str, torch.Tensor | ShardedTensor]:
    """{table: weight}, sharing memory with the tables: a ShardedTensor, or a plain tensor where every rank holds it whole."""
    return {name.split(".")[-2].removeprefix(PREFIX): weight for name, weight in model.state_dict().items() if ".embedding_bags." in name}


def describe(plan: ShardingPlan) -> dict[str, Any]:
    """The plan as JSON: {table: {"sharding", "kernel", "shards": [{"rank", "rows", "columns", "offset"}]}}."""
    described: dict[str, Any] = {}
    for module_plan in plan.plan.values():
        for table, parameter in module_plan.items():
            spec = parameter.sharding_spec
            shards = [
                {"rank": s.placement.rank(), "rows": s.shard_sizes[0], "columns": s.shard_sizes[1], "offset": list(s.shard_offsets)}
                for s in (spec.shards if spec is not None else [])
            ]
            described[table.removeprefix(PREFIX)] = {
                "sharding": parameter.sharding_type,
                "kernel": parameter.compute_kernel,
                "ranks": parameter.ranks,
                "shards": shards,
            }
    return described
