"""Tables that do not fit are refused in one line, and each way out that it names is one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_plan import CPU, GIB, GPUS, MIB, planned, refusal
from triptych.embeddings.memory import Machine
from triptych.embeddings.tables import EmbeddingTable
from triptych.embeddings.what_fits import round_up, size_text


def alternatives(message: str) -> dict[str, str]:
    """What a refusal says would fit."""
    patterns = {
        "ranks": r"with (\d+) ranks on \d+ nodes",
        "memory": r"with ([\d.]+ (?:[KMG]iB|bytes))(?: of \w+ memory)? a rank",
        "dim": r"with dim (\d+) for table 'big'",
        "fp16": r"with dtype = \"(fp16)\" for table 'big'",
        "uvm": r"with memory = \"(uvm)\" for table 'big'",
    }
    said = message.split("; it fits ")[1]
    found = {name: match[1] for name, pattern in patterns.items() if (match := re.search(pattern, said))}
    assert said.count("with ") == len(found), said
    return found


def in_bytes(text: str) -> int:
    number, unit = text.split()
    return int(float(number) * {"KiB": 1 << 10, "MiB": MIB, "GiB": GIB, "bytes": 1}[unit] + 0.5)


REFUSED = {
    "one table too large": ((EmbeddingTable(name="big", rows=2_000_000, dim=32),), replace(CPU, host_memory=128 * MIB)),
    "one rank": ((EmbeddingTable(name="big", rows=2_000_000, dim=32),), Machine("cpu", 1, 1, 200 * MIB)),
    "whole on one rank": (
        (EmbeddingTable(name="big", rows=2_000_000, dim=32, sharding="table_wise"),),
        replace(CPU, host_memory=160 * MIB),
    ),
    "gpu memory": (
        (EmbeddingTable(name="big", rows=2_000_000, dim=32), EmbeddingTable(name="small", rows=10_000, dim=8)),
        replace(GPUS, device_memory=40 * MIB),
    ),
    "host memory of gpus": ((EmbeddingTable(name="big", rows=2_000_000, dim=32, memory="uvm"),), replace(GPUS, host_memory=40 * MIB)),
    "id map": ((EmbeddingTable(name="big", rows=2_000_000, dim=4, ids="dynamic"),), replace(GPUS, host_memory=5 * MIB)),
}
WAYS = {
    "one table too large": {"ranks", "memory", "dim"},
    "one rank": {"ranks", "memory", "dim", "fp16"},
    "whole on one rank": {"memory", "dim"},
    "gpu memory": {"ranks", "memory", "dim", "uvm"},
    "host memory of gpus": {"ranks", "memory", "dim"},
    "id map": {"ranks", "memory"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_refusal_offers_fits(case: str) -> None:
    tables, machine = REFUSED[case]
    message = refusal(tables, machine)
    assert re.search(
        rf"^the tables do not fit {machine.world_size} ranks? with .* each, .*: rank \d+ needs .* \(table 'big' .*\); ", message
    )
    offered = alternatives(message)
    assert WAYS[case] <= offered.keys(), message
    kind = "host_memory" if case in ("host memory of gpus", "id map") or machine.device_type == "cpu" else "device_memory"
    if "ranks" in offered:
        ranks = int(offered["ranks"])
        planned(tables, replace(machine, world_size=ranks))
        refusal(tables, replace(machine, world_size=ranks // 2))
    enough = in_bytes(offered["memory"])
    planned(tables, replace(machine, **{kind: enough}))
    refusal(tables, replace(machine, **{kind: int(enough * 0.9)}))
    changes = {"dim": {"dim": int(offered.get("dim", 0))}, "fp16": {"dtype": "fp16"}, "uvm": {"memory": "uvm"}}
    for way in changes.keys() & offered.keys():
        planned((tables[0].model_copy(update=changes[way]), *tables[1:]), machine)


def test_too_little_of_both_memories() -> None:
    tables = (EmbeddingTable(name="big", rows=2_000_000, dim=32), EmbeddingTable(name="small", rows=900_000, dim=32, memory="uvm"))
    machine = replace(GPUS, host_memory=10 * MIB, device_memory=40 * MIB)
    offered = re.search(r"with (\S+ MiB) of GPU memory and (\S+ MiB) of host memory a rank", refusal(tables, machine))
    assert offered is not None
    device, host = map(in_bytes, offered.groups())
    planned(tables, replace(machine, device_memory=device, host_memory=host))
    refusal(tables, replace(machine, device_memory=int(device * 0.9), host_memory=host))
    refusal(tables, replace(machine, device_memory=device, host_memory=int(host * 0.9)))


@given(st.integers(1, 1 << 45))
def test_sizes_round_up(size: int) -> None:
    rounded = round_up(size)
    assert size <= rounded <= size * 1.1 + 1
    assert in_bytes(size_text(rounded)) >= size
