"""Row shards of a checkpoint: any cut reads any other's, and another dtype or shape is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.runs import save
from triptych.datasets.schema import InputError
from triptych.embeddings.dynamic.slot_map import RowShard
from triptych.launch.checkpoints.manifest import committed
from triptych.launch.checkpoints.parts import Value, local_parts
from triptych.launch.checkpoints.reader import Reader
from triptych.launch.distributed import Ranks

WHOLES = {
    "id": torch.arange(11) * 2**40,
    "vector": torch.randn(11, 4, generator=torch.Generator().manual_seed(0)),
    "cell": (torch.arange(11 * 6) % 256).to(torch.uint8).view(11, 2, 3),
    "taken": torch.arange(11) % 3 == 0,
}
NOT_SHARDED = {"step": torch.tensor(7.0), "nothing": torch.zeros(0, 4)}
CUTS = {1: [[0, 11]], 2: [[0, 4, 11], [0, 0, 11], [0, 11, 11]], 3: [[0, 1, 9, 11], [0, 5, 5, 11]]}
"""Where ranks' rows begin, and the end, for each world size; some ranks have none."""


def cut_rows(ranks: Ranks, cut: list[int]) -> dict[str, RowShard]:
    first, end = cut[ranks.rank : ranks.rank + 2]
    return {name: RowShard(whole[first:end].clone(), first, len(whole)) for name, whole in WHOLES.items()}


def save_cuts(ranks: Ranks, folder: Path) -> None:
    for i, cut in enumerate(CUTS[ranks.world_size]):
        state = cut_rows(ranks, cut) | NOT_SHARDED
        save(ranks, folder / f"step_{ranks.world_size}{i}", state, {"rank": torch.tensor(ranks.rank)})


def load_cuts(ranks: Ranks, folder: Path) -> int:
    """Read every checkpoint under every cut; returns how many were compared."""
    found = 0
    for saved in committed(folder):
        reader = Reader(saved)
        for name, whole in (WHOLES | NOT_SHARDED).items():
            assert torch.equal(reader.read(name), whole) and reader.read(name).dtype == whole.dtype, (saved, name)
        for cut in CUTS[ranks.world_size]:
            for name, expected in cut_rows(ranks, cut).items():
                held = RowShard(torch.zeros_like(expected.tensor), expected.first, expected.total)
                reader.copy_into(name, held)
                assert torch.equal(held.tensor, expected.tensor), (saved, cut, name)
                found += 1
        if int(saved.name.removeprefix("step_")) // 10 == ranks.world_size:
            assert reader.read_own("rank") == ranks.rank
    return found


def save_and_load_cuts(ranks: Ranks, folder: Path) -> int:
    save_cuts(ranks, folder)
    return load_cuts(ranks, folder)


def test_row_shards_are_read_under_any_other_cut(tmp_path: Path) -> None:
    saved = 0
    for world_size in (3, 1, 2):
        saved += len(CUTS[world_size])
        compared = saved * len(CUTS[world_size]) * len(WHOLES)
        assert run_on_ranks(world_size, save_and_load_cuts, tmp_path) == [compared] * world_size


def load_what_differs(ranks: Ranks, folder: Path) -> list[str]:
    """What loading into another dtype or shape says."""
    weight, tower = "model/lookup.embedding_bags.table_user.weight", "model/tower.0.weight"
    save(ranks, folder / "step_1", {weight: torch.ones(6, 4), tower: torch.ones(4)} | cut_rows(ranks, [0, 11]))
    reader = Reader(folder / "step_1")
    others: list[tuple[str, Value]] = [
        (weight, torch.zeros(6, 4, dtype=torch.float16)),
        (tower, torch.zeros(4, dtype=torch.bfloat16)),
        ("id", RowShard(torch.zeros(5, dtype=torch.int32), 6, 11)),
        ("id", RowShard(torch.zeros(5, dtype=torch.int64), 6, 12)),
    ]
    messages = []
    for name, target in others:
        with pytest.raises(InputError) as error:
            reader.copy_into(name, target)
        assert not any(part.tensor.any() for part in local_parts(target))
        messages.append(str(error.value).removeprefix(f"{reader.folder}: "))
    return messages


def test_another_dtype_or_shape_is_refused(tmp_path: Path) -> None:
    assert run_on_ranks(1, load_what_differs, tmp_path)[0] == [
        "table 'user' was saved as fp32, the recipe has fp16 ('model/lookup.embedding_bags.table_user.weight'); "
        "set tables.user.dtype back, or start another run",
        "'model/tower.0.weight' was saved as fp32, the recipe's is bf16; set the dtype back, or start another run",
        "'id' was saved as int64, the recipe's is int32; set the dtype back, or start another run",
        "'id' has shape [11], the recipe's has [12]",
    ]
