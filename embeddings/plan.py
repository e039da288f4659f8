"""Which rank holds which part of which table, decided before any process group exists, kept in a run and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec, ParameterSharding, ShardingPlan, ShardMetadata
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..datasets.schema import InputError, Schema
from .memory import Machine, Memory, Share
from .optimizer import TableTraining
from .planner import Request, cache_params, fast_plan, frugal_plan
from .tables import PREFIX, EmbeddingTable
from .what_fits import refusal


@dataclass(frozen=True)
class Plan:
    """Where everything goes, and what it takes there."""

    sharding: ShardingPlan
    shares: tuple[Share, ...]
    """By rank, then by table."""
    id_maps: Mapping[str, int]
    """{table with dynamic ids: bytes of its map on every rank}, in host memory."""
    machine: Machine
    made_for: Mapping[str, Any]

    def on(self, rank: int) -> tuple[Share, ...]:
        return tuple(share for share in self.shares if share.rank == rank)

    def needs(self) -> list[Memory]:
        """Of each rank."""
        needs = [Memory(host=sum(self.id_maps.values()))] * self.machine.world_size
        for share in self.shares:
            needs[share.rank] += share.memory
        return needs

    def described(self) -> dict[str, Any]:
        """As JSON: {"made_for", "tables", "sha256"}; the tables as `describe` has them."""
        content = {"made_for": dict(self.made_for), "tables": describe(self.sharding)}
        return {**content, "sha256": _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    """Of what a plan says: TorchRec takes one that was edited at its word, and looks rows up in the wrong part."""
    return hashlib.sha256(json.dumps([content.get("made_for"), content.get("tables")], sort_keys=True).encode()).hexdigest()


def describe(plan: ShardingPlan) -> dict[str, Any]:
    """{table: {"sharding", "kernel", "ranks", "shards": [{"rank", "rows", "columns", "offset"}]}}; no shards where it is replicated."""
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


def make_plan(
    model: nn.Module, sharders: Sequence[Any], tables: Sequence[EmbeddingTable], schema: Schema, training: TableTraining, machine: Machine
) -> Plan:
    """The fastest plan that TorchRec finds among those that fit. The same arguments give the same plan, in any process.

    Args:
        model: holds the collections of the tables, on meta, anywhere inside.
    Raises:
        InputError: nothing fits, and what would; or a table's sharding contradicts its optimizer, dtype or features.
    """
    request = Request(sharders, tuple(tables), schema, training, machine)
    sharding = fast_plan(request, model) or frugal_plan(request, model)
    if sharding is None:
        raise InputError(refusal(request, _attempt))
    return _plan(sharding, request)


def _attempt(request: Request, model: nn.Module) -> Plan | None:
    sharding = frugal_plan(request, model)
    return _plan(sharding, request) if sharding else None


def _plan(sharding: ShardingPlan, request: Request) -> Plan:
    parts = sorted(_shares(sharding, request), key=lambda s: (s.rank, list(request.uses).index(s.table), s.row_offset, s.column_offset))
    return Plan(sharding, tuple(parts), request.id_maps, request.machine, request.made_for())


def _shares(sharding: ShardingPlan, request: Request) -> Iterator[Share]:
    for name, facts in describe(sharding).items():
        use = request.uses[name]
        parts = [(part["rank"], (part["rows"], part["columns"]), tuple(part["offset"])) for part in facts["shards"]]
        whole = (use.table.rows, use.table.dim), (0, 0)
        for rank, size, offset in parts or [(rank, *whole) for rank in facts["ranks"]]:
            yield use.share(request.machine, facts["sharding"], facts["kernel"], rank, size, offset)


def saved_plan(
    described: Mapping[str, Any],
    model: nn.Module,
    tables: Sequence[EmbeddingTable],
    schema: Schema,
    training: TableTraining,
    machine: Machine,
) -> Plan | None:
    """The plan that `Plan.described` told of; None where it was made for something else, was changed since, or does not fit now.

    Raises:
        InputError: as make_plan, other than for want of memory.
    """
    request = Request((), tuple(tables), schema, training, machine)
    if described.get("made_for") != request.made_for() or described.get("sha256") != _digest(described):
        return None
    sharding = ShardingPlan({path: _module_plan(names, described["tables"], request) for path, names in _tables_of(model)})
    plan = _plan(sharding, request)
    return plan if all(need.fits(machine.for_tables) for need in plan.needs()) else None


def _tables_of(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(path of a collection, its tables)."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            yield path, [config.name.removeprefix(PREFIX) for config in module.embedding_bag_configs()]
        elif isinstance(module, EmbeddingCollection):
            yield path, [config.name.removeprefix(PREFIX) for config in module.embedding_configs()]


def _module_plan(names: list[str], described: Mapping[str, Any], request: Request) -> EmbeddingModuleShardingPlan:
    module_plan, machine = EmbeddingModuleShardingPlan(), request.machine
    for name in names:
        facts = described[name]
        shards = [
            ShardMetadata(
                shard_offsets=list(shard["offset"]),
                shard_sizes=[shard["rows"], shard["columns"]],
                placement=placement(machine.device_type, shard["rank"], machine.local_world_size),
            )
            for shard in facts["shards"]
        ]
        module_plan[PREFIX + name] = ParameterSharding(
            sharding_type=facts["sharding"],
            compute_kernel=facts["kernel"],
            ranks=list(facts["ranks"]),
            sharding_spec=EnumerableShardingSpec(shards) if shards else None,
            cache_params=cache_params(request.uses[name].table, facts["kernel"]),
        )
    return module_plan
