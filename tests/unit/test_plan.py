"""The sharding plan: made without a process group, the same in every process, whole, within memory, and read back as it was."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triptych.datasets.schema import DataSection, Feature, InputError, Schema
from triptych.embeddings.memory import MEMORY_RESERVED, Machine, Memory, this_machine
from triptych.embeddings.optimizer import TableTraining
from triptych.embeddings.plan import Plan, make_plan, saved_plan
from triptych.embeddings.sharding import sharders
from triptych.embeddings.tables import EmbeddingTable, meta_collections

ROOT = Path(__file__).parents[2]
MIB, GIB = 1 << 20, 1 << 30
TRAINING = TableTraining("rowwise_adagrad", 0.02, 1e-8)
ADAGRAD = TableTraining("adagrad", 0.02, 1e-8)
CPU = Machine("cpu", 2, 2, 8 * GIB)
GPUS = Machine("cuda", 4, 2, 8 * GIB, 2 * GIB)


def schema_of(tables: tuple[EmbeddingTable, ...], attention: str | None = None, batch_size: int = 64) -> Schema:
    """An id and a list of ids for each table; the list of one of them with attention."""
    features: list[Feature] = []
    for table in tables:
        pooling = "attention" if table.name == attention else "mean"
        features.append(Feature(name=f"{table.name}_id", kind="id", table=table.name, side="item"))
        features.append(Feature(name=f"{table.name}_list", kind="ids", table=table.name, side="user", max_length=5, pooling=pooling))
    return Schema(DataSection(root="/", batch_size=batch_size), tables, tuple(features), ())


def model_of(tables: tuple[EmbeddingTable, ...], schema: Schema) -> nn.Module:
    return nn.ModuleDict({name: c for name, c in meta_collections(tables, schema)._asdict().items() if c is not None})


def planned(
    tables: tuple[EmbeddingTable, ...], machine: Machine = CPU, training: TableTraining = TRAINING, attention: str | None = None
) -> Plan:
    schema = schema_of(tables, attention)
    return make_plan(model_of(tables, schema), sharders(training), tables, schema, training, machine)


def refusal(
    tables: tuple[EmbeddingTable, ...], machine: Machine = CPU, training: TableTraining = TRAINING, attention: str | None = None
) -> str:
    with pytest.raises(InputError) as caught:
        planned(tables, machine, training, attention)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TABLES = (
    EmbeddingTable(name="a", rows=1000, dim=8),
    EmbeddingTable(name="b", rows=333, dim=16, dtype="fp16"),
    EmbeddingTable(name="c", rows=7, dim=4, sharding="data_parallel"),
    EmbeddingTable(name="d", rows=50, dim=12, ids="dynamic", min_count=2),
    EmbeddingTable(name="e", rows=41, dim=8, sharding="row_wise"),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[EmbeddingTable, ...], Machine, str | None]:
    memories = st.sampled_from(["device", "uvm", "uvm_caching"])
    ids = {"device": ["hash", "dynamic"], "uvm": ["hash", "dynamic"], "uvm_caching": ["hash"]}
    tables = tuple(
        EmbeddingTable(
            name=f"t{i}",
            rows=draw(st.integers(31, 5000)),  # enough for a row on each of six ranks
            dim=draw(st.sampled_from([4, 8, 20])),
            dtype=draw(st.sampled_from(["fp32", "fp16"])),
            memory=memory,
            ids=draw(st.sampled_from(ids[memory])),
            sharding=draw(st.sampled_from(["auto", "table_wise", "row_wise", "column_wise"])),
        )
        for i, memory in enumerate(draw(st.lists(memories, min_size=1, max_size=7)))
    )
    nodes, ranks = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)]))
    device = draw(st.sampled_from(["cpu", "cuda"]))
    machine = Machine(device, nodes * ranks, ranks, 8 * GIB, 8 * GIB if device == "cuda" else None)
    return tables, machine, draw(st.sampled_from([None, "t0"]))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_parts_cover_each_table_once_and_a_plan_reads_back(problem: tuple[tuple[EmbeddingTable, ...], Machine, str | None]) -> None:
    tables, machine, attention = problem
    schema = schema_of(tables, attention)
    model = model_of(tables, schema)
    plan = planned(tables, machine, ADAGRAD, attention)
    for table in tables:
        shares = [share for share in plan.shares if share.table == table.name]
        if shares[0].sharding == "data_parallel":
            assert [(s.rank, s.rows, s.columns) for s in shares] == [(rank, table.rows, table.dim) for rank in range(machine.world_size)]
            continue
        covered = np.zeros((table.rows, table.dim), np.uint8)
        for share in shares:
            covered[share.row_offset : share.row_offset + share.rows, share.column_offset : share.column_offset + share.columns] += 1
        assert (covered == 1).all()
        assert sum(s.weights for s in shares) == table.rows * table.dim * (2 if table.dtype == "fp16" else 4)
        assert sum(s.optimizer for s in shares) == table.rows * table.dim * 4
    assert all(need.fits(machine.for_tables) for need in plan.needs())
    described = json.loads(json.dumps(plan.described()))
    assert saved_plan(described, model, tables, schema, ADAGRAD, machine) == plan


def test_no_rank_is_left_without_a_row() -> None:
    """FBGEMM's CPU kernel cannot look up in a part of no rows: 5 rows on 4 ranks are 2, 2, 1 and none."""
    machine = replace(CPU, world_size=4, local_world_size=4)
    for rows, rowless in ((2, True), (5, True), (6, True), (7, False), (9, True), (10, False)):
        table = EmbeddingTable(name="a", rows=rows, dim=4)
        allowed = planned((table,), machine).made_for["tables"][0]["allowed"]
        assert ("row_wise" not in allowed) == rowless, rows
        if rowless:
            with pytest.raises(InputError, match="would leave a rank without one of its"):
                planned((table.model_copy(update={"sharding": "row_wise"}),), machine)


def test_a_saved_plan_serves_only_what_it_was_made_for() -> None:
    schema = schema_of(TABLES)
    model, plan = model_of(TABLES, schema), planned(TABLES)
    described = plan.described()

    def read(described: dict, tables: tuple = TABLES, training: TableTraining = TRAINING, machine: Machine = CPU) -> Plan | None:
        return saved_plan(described, model, tables, schema, training, machine)

    assert read(described) == plan
    assert read(described, machine=replace(CPU, host_memory=4 * GIB)) is not None
    assert read(described, machine=replace(CPU, host_memory=10_000)) is None
    assert read(described, machine=replace(CPU, world_size=4)) is None
    assert read(described, machine=replace(CPU, local_world_size=1)) is None
    assert read(described, training=replace(TRAINING, optimizer="sgd")) is None
    wider = (TABLES[0].model_copy(update={"dim": 16}), *TABLES[1:])
    assert read(described, tables=wider) is None
    assert read(described, training=replace(TRAINING, weight_decay=0.1), tables=TABLES[:2]) is None
    assert read({}) is None and read({"made_for": described["made_for"]}) is None
    torn = json.loads(json.dumps(described))
    torn["tables"]["e"]["shards"].pop()
    assert read(torn) is None
    far = json.loads(json.dumps(described))
    far["tables"]["e"]["shards"][0]["rank"] = 2
    assert read(far) is None
    # Whole, but not as TorchRec cuts rows: ids would be looked up in the wrong part.
    moved = json.loads(json.dumps(described))
    first, second = moved["tables"]["e"]["shards"]
    first["rows"], second["rows"], second["offset"] = first["rows"] - 5, second["rows"] + 5, [first["rows"] - 5, 0]
    assert read(moved) is None


def test_needs_no_process_group_and_is_the_same_in_every_process(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    script = (
        "import json; from tests.unit.test_plan import *; "
        "print(json.dumps([planned(TABLES, m).described() for m in (CPU, replace(CPU, world_size=1, local_world_size=1), GPUS)]))"
    )
    told = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120, check=True)
        told.add(done.stdout)
    assert len(told) == 1
    machines = (CPU, replace(CPU, world_size=1, local_world_size=1), GPUS)
    assert json.loads(told.pop()) == json.loads(json.dumps([planned(TABLES, m).described() for m in machines]))


def test_table_row_wise_stays_on_one_node() -> None:
    tables = tuple(EmbeddingTable(name=f"t{i}", rows=101, dim=8, sharding="table_row_wise") for i in range(2))
    plan = planned(tables, Machine("cpu", 4, 2, GIB))
    for name in ("t0", "t1"):
        shares = [share for share in plan.shares if share.table == name]
        assert [share.rows for share in shares] == [51, 50]
        assert [share.rank for share in shares] in ([0, 1], [2, 3])
    assert {share.rank for share in plan.shares} == {0, 1, 2, 3}
    one_node = [share for share in planned(tables, CPU).shares if share.table == "t0"]
    assert [(share.rank, share.rows, share.row_offset) for share in one_node] == [(0, 51, 0), (1, 50, 51)]


@pytest.mark.parametrize(
    ("table", "training", "attention", "expected"),
    [
        ({"sharding": "column_wise"}, TRAINING, None, 'sharding = "column_wise" needs train.embedding_optimizer = "adagrad" or "sgd"'),
        ({"sharding": "data_parallel"}, TRAINING, "a", "use auto, table_wise, row_wise or column_wise"),
        ({"sharding": "table_row_wise"}, TRAINING, "a", "use auto, table_wise, row_wise or column_wise"),
        ({"sharding": "data_parallel", "dtype": "fp16"}, TRAINING, None, 'does not go with dtype = "fp16"'),
        ({"sharding": "data_parallel"}, replace(TRAINING, weight_decay=0.1), None, "does not go with weight decay"),
        ({"sharding": "data_parallel", "weight_decay": 0.1}, TRAINING, None, "does not go with weight decay"),
        ({"sharding": "data_parallel"}, replace(TRAINING, optimizer="adam"), None, 'does not go with train.embedding_optimizer = "adam"'),
    ],
)
def test_shardings_that_would_train_another_model(table: dict, training: TableTraining, attention: str | None, expected: str) -> None:
    message = refusal((EmbeddingTable(name="a", rows=100, dim=8, **table),), training=training, attention=attention)
    assert message.startswith("table 'a': sharding = ") and expected in message


def test_auto_replicates_no_table_that_would_train_differently() -> None:
    free = planned((EmbeddingTable(name="a", rows=7, dim=4),)).made_for["tables"][0]["allowed"]
    assert free == ["table_wise", "row_wise", "data_parallel"]
    for table, training, attention in (
        ({"dtype": "fp16"}, TRAINING, None),
        ({"weight_decay": 0.1}, TRAINING, None),
        ({"memory": "uvm"}, TRAINING, None),
        ({}, TRAINING, "a"),
    ):
        plan = planned((EmbeddingTable(name="a", rows=7, dim=4, **table),), training=training, attention=attention)
        assert plan.made_for["tables"][0]["allowed"] == ["table_wise", "row_wise"]


def test_uvm_lies_in_host_memory_and_its_cache_on_the_gpu() -> None:
    rows, dim = 1000, 8
    kinds = {"device": "fused", "uvm": "fused_uvm", "uvm_caching": "fused_uvm_caching"}
    own = {"uvm_caching": {"cache": 0.1}}
    tables = tuple(
        EmbeddingTable.model_validate({"name": m, "rows": rows, "dim": dim, "memory": m, "sharding": "table_wise", **own.get(m, {})})
        for m in kinds
    )
    by_name = {share.table: share for share in planned(tables, GPUS).shares}
    assert {name: share.kernel for name, share in by_name.items()} == kinds
    table_bytes = rows * dim * 4 + rows * 4
    assert by_name["device"].memory == Memory(0, table_bytes + by_name["device"].activations)
    assert by_name["uvm"].memory == Memory(table_bytes, by_name["uvm"].activations)
    caching = by_name["uvm_caching"]
    assert caching.cache == 100 * (dim * 4 + 16) + rows * 4
    assert caching.memory == Memory(table_bytes, caching.activations + caching.cache)
    on_cpu = planned(tables, CPU)
    assert all(share.kernel == "fused" and share.memory.device == 0 and share.cache == 0 for share in on_cpu.shares)


def test_id_maps_take_host_memory_of_every_rank() -> None:
    tables = (
        EmbeddingTable(name="a", rows=1001, dim=8, ids="dynamic", sharding="table_wise"),
        EmbeddingTable(name="b", rows=100, dim=8, ids="dynamic", min_count=3, sharding="table_wise"),
    )
    plan = planned(tables, GPUS)
    assert plan.id_maps == {"a": 251 * 16, "b": 25 * 32}
    assert [need.host for need in plan.needs()] == [251 * 16 + 25 * 32] * 4


def test_a_table_of_a_hundred_million_rows_is_planned_at_once() -> None:
    tables = (EmbeddingTable(name="big", rows=100_000_000, dim=16), *TABLES)
    planned(TABLES)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    plan = planned(tables, replace(CPU, host_memory=16 * GIB))
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB, of 6.4 GB of weights
    assert sum(share.weights for share in plan.shares if share.table == "big") == 100_000_000 * 16 * 4


def test_ranks_of_a_node_share_its_memory() -> None:
    one, four = (this_machine("cpu", 4, local) for local in (1, 4))
    assert four.host_memory == one.host_memory // 4 and one.device_memory is None
    assert four.for_tables.host == int(four.host_memory * (1 - MEMORY_RESERVED))
    assert this_machine("cuda", 4, 2, host_memory=5, device_memory=7) == Machine("cuda", 4, 2, 5, 7)
