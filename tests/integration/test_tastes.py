"""Attention beats the mean where users have several tastes, from the world to the metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from triptych.datasets.world import World, write_world
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.trainer import Trainer


def click_auc(ranks: Ranks, root: Path, seeds: list[int]) -> dict[str, list[float]]:
    """The AUC of the click on `valid` after an epoch, of each pooling, for each seed."""
    auc: dict[str, list[float]] = {"mean": [], "attention": []}
    for pooling, found in auc.items():
        for seed in seeds:
            history = [f"features.history.{key}" for key in (f"pooling={pooling}", "max_length=50")]
            recipe = load_recipe("demo", [f"data.root={root}", "tables.item.dim=4", f"train.seed={seed}", *history])
            run = root / f"{pooling}_{seed}"
            Trainer(recipe, run, ranks, resume=False).fit()
            found.append(json.loads((run / "result.json").read_text())["tasks"]["ctr"]["auc"])
    return auc


@pytest.mark.parametrize(
    "rows, items, seeds, gain",
    [
        pytest.param(80_000, 200, [0], 0.005, id="short"),
        pytest.param(200_000, 500, [0, 1, 2], 0.005, id="long", marks=pytest.mark.long),
    ],
)
def test_attention_beats_the_mean_of_several_tastes(tmp_path: Path, rows: int, items: int, seeds: list[int], gain: float) -> None:
    write_world(World(rows=rows, items=items, users=rows // 9, tastes=3, history=50, seed=11), tmp_path)
    auc = run_on_ranks(1, click_auc, tmp_path, seeds, timeout=1200)[0]
    gains = [attention - mean for mean, attention in zip(auc["mean"], auc["attention"], strict=True)]
    assert min(gains) > 0 and sum(gains) / len(gains) > gain, auc
