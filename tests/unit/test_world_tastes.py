"""Worlds whose users have several tastes: the best match counts, and the history shows all of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.unit.test_world import contents, logit, read_log
from triptych.datasets.population import CLICK, CONVERSION
from triptych.datasets.world import World, _Truth, write_world

SEVERAL = World(rows=20_000, users=2_000, items=500, tastes=3, history=50)


def gain_by_share_of_history(folder: Path) -> tuple[float, float]:
    """How much more a user likes an item, in logits beyond the item's own mean, when the history holds some of its category, and much."""
    rows, items = read_log(folder), pq.read_table(folder / "items.parquet")
    category_of = np.unique(items["category"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    history = rows["history"].combine_chunks()
    lengths, item, score = history.value_lengths().to_numpy(), rows["item_id"].to_numpy(), logit(rows["true_ctr"].to_numpy())
    row_of = np.repeat(np.arange(len(rows)), lengths)
    same = category_of[history.flatten().to_numpy()] == category_of[item[row_of]]
    share = np.bincount(row_of, same, len(rows)) / np.maximum(lengths, 1)
    score = score - (np.bincount(item, score) / np.maximum(np.bincount(item), 1))[item]
    known = lengths >= 20
    little, some, much = (score[known & (share >= low) & (share < high)].mean() for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 1)))
    return some - little, much - little


def test_a_user_of_several_tastes_likes_what_is_a_part_of_the_history(tmp_path: Path) -> None:
    for tastes in (1, 3):
        write_world(replace(SEVERAL, tastes=tastes), tmp_path / str(tastes))
    one, several = (gain_by_share_of_history(tmp_path / tastes) for tastes in ("1", "3"))
    assert several[1] > several[0] > 0.4
    assert several[1] > 2 * one[1] > 0


def test_of_several_tastes_the_best_match_counts() -> None:
    truth = _Truth(SEVERAL)
    seen = truth.draw(np.random.default_rng(1), 5_000)
    taste, item, focus = truth.users.taste[seen.user], truth.items.taste[seen.item], truth.focus[seen.page, 0]
    assert taste.shape == (5_000, 3, 2, item.shape[2])
    for kind in (CLICK, CONVERSION):
        match = np.stack([(taste[:, k, kind] * item[:, kind] * focus).sum(axis=1) for k in range(3)]).max(axis=0)
        liking = truth.liking(seen)[:, kind]
        assert np.corrcoef(match, liking)[0, 1] == pytest.approx(1)
        assert (liking.mean(), liking.std()) == pytest.approx((0, 1), abs=0.08)


def test_histories_are_as_long_as_asked(tmp_path: Path) -> None:
    write_world(replace(SEVERAL, history=35), tmp_path)
    lengths = read_log(tmp_path)["history"].combine_chunks().value_lengths().to_numpy()
    assert lengths.min() == 0 and lengths.max() == 35


def test_worlds_of_several_tastes_have_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("here", "there"):
        write_world(SEVERAL, tmp_path / name)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
