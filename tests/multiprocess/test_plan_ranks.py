"""A plan against what ranks hold: bytes of weights and optimizer state, and the same parts from a plan that was read back."""

from __future__ import annotations

import json
import os

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.ranks import run_on_ranks
from triptych.datasets.schema import DataSection, Feature, Schema
from triptych.embeddings.memory import Machine
from triptych.embeddings.optimizer import TableOptimizer, TableTraining
from triptych.embeddings.plan import make_plan, saved_plan
from triptych.embeddings.sharding import shard, sharders, table_weights
from triptych.embeddings.tables import EmbeddingTable, meta_collections
from triptych.launch.distributed import Ranks

TABLES = (
    EmbeddingTable(name="whole", rows=100, dim=8, sharding="table_wise"),
    EmbeddingTable(name="half", rows=53, dim=12, dtype="fp16", sharding="table_wise"),
    EmbeddingTable(name="rows", rows=97, dim=8, sharding="row_wise"),
    EmbeddingTable(name="half_rows", rows=31, dim=4, dtype="fp16", sharding="row_wise"),
    EmbeddingTable(name="node", rows=45, dim=8, sharding="table_row_wise"),
    EmbeddingTable(name="copies", rows=20, dim=4, sharding="data_parallel"),
    EmbeddingTable(name="attended", rows=29, dim=8, dtype="fp16"),
)
COLUMNS = EmbeddingTable(name="columns", rows=30, dim=16, sharding="column_wise")


def held(ranks: Ranks, optimizer: TableOptimizer, local_world_size: int) -> tuple[list[int], list[int], list[object], list[object]]:
    """Bytes planned and bytes held, of weights and optimizer state, fused and replicated; parts of a plan, and of it read back."""
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_world_size), "LOCAL_RANK": str(ranks.rank % local_world_size)}
    tables = TABLES if optimizer == "rowwise_adagrad" else (*TABLES, COLUMNS)
    features = [Feature(name=f"{t.name}_{kind}", kind=kind, table=t.name, side="item") for t in tables for kind in ("id", "ids")]  # type: ignore[arg-type]
    features[-1 if tables is TABLES else -3] = Feature(name="seen", kind="ids", table="attended", side="user", pooling="attention")
    schema = Schema(DataSection(root="/", batch_size=16), tables, tuple(features), ())
    training, machine = TableTraining(optimizer, 0.1, 1e-8), Machine("cpu", ranks.world_size, local_world_size, 1 << 30)

    def model() -> nn.Module:
        return nn.ModuleDict({name: c for name, c in meta_collections(tables, schema)._asdict().items() if c is not None})

    plan = make_plan(model(), sharders(training), tables, schema, training, machine)
    again = saved_plan(json.loads(json.dumps(plan.described())), model(), tables, schema, training, machine)
    assert again is not None and again == plan
    sharded, resharded = (shard(model(), p.sharding, tables, training, device=ranks.device, seed=0) for p in (plan, again))
    lookups = [lookup for module in sharded.modules() for lookup in getattr(module, "_lookups", [])]
    fused = [module for lookup in lookups for module in lookup.modules() if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]
    weights = sum(size(part) for module in fused for part in module.split_embedding_weights())
    state = sum(size(part) for module in fused for parts in module.split_optimizer_states() for part in parts)
    copies = {"copies": next(parameter for name, parameter in sharded.named_parameters() if "table_copies" in name)}
    replicated = training.replicated(copies, tables)
    copies_state = sum(size(v) for part in replicated.state.values() for key, v in part.items() if key != "step")
    mine, shared = plan.on(ranks.rank), {"copies"}
    planned = [
        sum(share.weights for share in mine if share.table not in shared),
        sum(share.weights for share in mine if share.table in shared),
        sum(share.optimizer for share in mine if share.table not in shared),
        sum(share.optimizer for share in mine if share.table in shared),
    ]
    return planned, [weights, sum(size(p) for p in copies.values()), state, copies_state], parts_of(sharded), parts_of(resharded)


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def parts_of(model: nn.Module) -> list[object]:
    """Where this rank's parts lie, and what is in them."""
    found: list[object] = []
    for name, weight in sorted(table_weights(model).items()):
        if isinstance(weight, ShardedTensor):
            found += [
                (name, part.metadata.shard_offsets, part.metadata.shard_sizes, part.tensor.tolist()) for part in weight.local_shards()
            ]
        else:
            found.append((name, weight.tolist()))
    return found


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_bytes_are_those_that_ranks_hold(optimizer: TableOptimizer) -> None:
    for planned, real, parts, parts_again in run_on_ranks(2, held, optimizer, 2):
        assert planned == real
        assert parts == parts_again and parts


def test_bytes_on_two_nodes() -> None:
    results = run_on_ranks(4, held, "adagrad", 2)
    assert all(planned == real and parts == again for planned, real, parts, again in results)
