"""triptych plan: where each table goes and what it takes of each rank, before anything runs."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console
from rich.table import Table

from ..datasets.schema import InputError
from ..embeddings.memory import DeviceType, Machine, Memory, Share, this_machine
from ..embeddings.plan import Plan
from ..embeddings.what_fits import size_text
from .build import plan_of
from .config import Recipe
from .distributed import device_type, quiet_the_stack

EVERY_RANK = 8
"""Ranks up to which each is shown; above, each table, and the emptiest and fullest rank."""
PIPED_WIDTH = 200
GIB = 1 << 30
MOST_GIB = 1 << 20
_BYTES = ("weights", "optimizer", "activations", "cache")


def machine_like(ranks: int, nodes: int, device: str | None, memory: float | None, host_memory: float | None) -> Machine:
    """The ranks that the options describe; what they leave out is as on this machine, with `ranks / nodes` ranks.

    Args:
        memory: GiB a rank, of the GPU, or on CPU of the host.
        host_memory: GiB a rank beside a GPU.
    Raises:
        InputError: the options contradict each other, or there is no GPU to ask.
    """
    kinds = get_args(DeviceType)
    if device is not None and device not in kinds:
        raise InputError(f"--device {device}: use {' or '.join(kinds)}")
    for option, size in (("--memory", memory), ("--host-memory", host_memory)):
        if size is not None and not size <= MOST_GIB:
            raise InputError(f"{option} {size}: GiB a rank, at most {MOST_GIB}")
    if ranks % nodes:
        raise InputError(f"--ranks {ranks} --nodes {nodes}: every node has as many ranks, so nodes must divide ranks")
    kind: DeviceType = device_type() if device is None else "cuda" if device == "cuda" else "cpu"
    given, given_host = (None if size is None else int(size * GIB) for size in (memory, host_memory))
    if kind == "cuda":
        return this_machine(kind, ranks, ranks // nodes, host_memory=given_host, device_memory=given)
    if given_host is not None:
        raise InputError("--host-memory goes with --device cuda; on CPU all memory is the host's: use --memory")
    return this_machine(kind, ranks, ranks // nodes, host_memory=given)


def plan(recipe: Recipe, machine: Machine, json: Path | None = None) -> None:
    """Print the plan that a training on these ranks would use, and write it as JSON.

    Raises:
        InputError: nothing fits; says what would. Or the file cannot be written.
    """
    quiet_the_stack()
    made = plan_of(recipe, machine)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    tables = [_of_rank(made, rank) for rank in range(machine.world_size)] if machine.world_size <= EVERY_RANK else [_by_table(made)]
    for table in tables:
        table.box = box.SIMPLE if console.is_terminal else None
        console.print(table)
    if machine.world_size > EVERY_RANK:
        console.print(_ends(made), highlight=False)
    if json is not None:
        try:
            json.write_text(jsonlib.dumps(as_json(made), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{json}: cannot be written ({error.strerror})") from error


def as_json(plan: Plan) -> dict[str, object]:
    """What a run's plan.json says, and the bytes: of each rank, and of each part of a table."""
    room = plan.machine.for_tables
    parts = [{key: value for key, value in vars(share).items() if key != "memory"} for share in plan.shares]
    ranks = [{"rank": rank, "host": need.host, "device": need.device} for rank, need in enumerate(plan.needs())]
    return plan.described() | {"room": vars(room), "ranks": ranks, "parts": parts, "id_maps": dict(plan.id_maps)}


def _table(title: str, first: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for name in first:
        table.add_column(name)
    for name in ("rows x columns", *_BYTES, "ids", "total"):
        table.add_column(name, justify="right")
    return table


def _line(shares: Sequence[Share], id_map: int) -> list[str]:
    """Bytes of some parts, and of an id map."""
    sizes = [sum(getattr(share, name) for share in shares) for name in _BYTES]
    return [size_text(size) if size else "-" for size in (*sizes, id_map, sum(sizes) + id_map)]


def _of_rank(plan: Plan, rank: int) -> Table:
    table = _table(f"rank {rank}", ("table", "sharding", "kernel"))
    shares = plan.on(rank)
    for share in shares:
        size = f"{share.rows:,} x {share.columns}"
        table.add_row(share.table, share.sharding, share.kernel, size, *_line([share], 0))
    for name, id_map in plan.id_maps.items():
        table.add_row(name, "id map", "", "", *_line([], id_map))
    table.add_row("total", "", "", "", *_line(shares, sum(plan.id_maps.values())))
    table.caption, table.caption_justify = _against(plan, plan.needs()[rank]), "left"
    return table


def _by_table(plan: Plan) -> Table:
    machine = plan.machine
    table = _table(
        f"{machine.world_size} ranks, {machine.local_world_size} on each node; sums over ranks", ("table", "sharding", "kernel", "ranks")
    )
    for name, facts in plan.described()["tables"].items():
        shares = [share for share in plan.shares if share.table == name]
        sizes = sorted({(share.rows, share.columns) for share in shares}, reverse=True)
        of_ranks = str(len({share.rank for share in shares}))
        size = f"{sizes[0][0]:,} x {sizes[0][1]}" + (" at most" if len(sizes) > 1 else "")
        id_map = plan.id_maps.get(name, 0) * machine.world_size
        table.add_row(name, facts["sharding"], facts["kernel"], of_ranks, size, *_line(shares, id_map))
    return table


def _ends(plan: Plan) -> str:
    """The ranks that the tables take least and most of."""
    needs = plan.needs()
    order = sorted(range(len(needs)), key=lambda rank: (needs[rank].device, needs[rank].host))
    return "\n".join(f"{end}: rank {rank} with {_against(plan, needs[rank])}" for end, rank in (("least", order[0]), ("most", order[-1])))


def _against(plan: Plan, need: Memory) -> str:
    """`1.2 GiB of 6.4 GiB for tables`."""
    room = plan.machine.for_tables
    host = f"{size_text(need.host)} of {size_text(room.host)} of host memory for tables"
    if plan.machine.device_type == "cpu":
        return host
    return f"{size_text(need.device)} of {size_text(room.device)} of GPU memory for tables, {host}"
