"""A run survives kills of any process at any moment: it ends equal to the undisturbed run, and each row is trained once an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, Done, assert_close_runs, assert_equal_runs, table
from tests.faults.kills import Kill
from tests.small import write_log

KEEP, KEEP_BEST, SAVE_EVERY, STEPS = 2, 1, 3, 60
RECIPE = [
    "train.epochs=2", "train.evaluate_every=10", f"checkpoint.every_steps={SAVE_EVERY}", f"checkpoint.keep={KEEP}",
    f"checkpoint.keep_best={KEEP_BEST}", "model.dropout=0.2", "features.length.transform=standard", "tables.item.ids=vocabulary",
    "tables.item.sharding=row_wise", "tables.user.ids=dynamic", "tables.user.rows=65",
]  # fmt: skip
# What a kill can cost: the newest checkpoint may not be committed yet when the next one is due.
MOST_REPEATED = 2 * SAVE_EVERY


def random_moments(count: int, seed: int, who: Sequence[str]) -> list[Kill]:
    """Any time after a step of an attempt: from the next one's exchange of ids to the end of a save."""
    draw = random.Random(seed)
    return [
        Kill("step", draw.randint(3, 9), draw.randrange(2), draw.choice(who), delay=draw.choice([0, draw.random() / 10]))
        for _ in range(count)
    ]


SHORT = [
    Kill("step", 8, rank=1, delay=0.01),
    Kill("block", 40, rank=1),
    Kill("read", 5, rank=1),
    Kill("rename checkpoint", 2, who="all"),
    Kill("rename manifest.json"),
    Kill(f"prune {STEPS}"),
]
SAVING = [
    Kill("block", 1),
    Kill("block", 60, rank=1),
    Kill("file", 5, rank=1, who="all"),
    Kill("file written", 3, who="other"),
    Kill("file written", 7, rank=1),
    Kill("commit", 2),
    Kill("text manifest.json", 2),
    Kill("sync", 4),
]
COMMITTING = [
    Kill("sync", 5, who="all"),
    Kill("rename checkpoint", 2),
    Kill("renamed checkpoint", 2, who="other"),
    Kill("prune", 3, who="all"),
    Kill("unlink", 2),
    Kill("unlink", 9, who="other"),
    Kill(f"prune {STEPS}", who="all"),
]
SMALL_FILES = [
    Kill("rename vocabulary_item.parquet"),
    Kill("text statistics.json.writing"),
    Kill("text recipe.toml.writing", who="all"),
    Kill("rename plan.json"),
    Kill("step", 7),
    Kill("verify", 1, rank=1),
    Kill("read", 3),
    Kill("text metrics.jsonl.writing"),
    Kill("rename metrics.jsonl"),
    Kill("record", 3),
    Kill("evaluated"),
    Kill("evaluated", rank=1, who="all"),
    Kill("text manifest.json.writing", who="all"),
    Kill("renamed manifest.json"),
    Kill(f"unlink after {STEPS}", 2),
    Kill("text result.json.writing"),
    Kill("rename result.json", who="all"),
]
TORCHRUN = [
    Kill("step", 5, who="torchrun"),
    Kill("block", 40, rank=1, who="torchrun"),
    Kill("commit", 2, who="torchrun"),
    Kill("read", 2, rank=1, who="torchrun"),
]
IN_FOREGROUND = [
    Kill("step", 5, rank=1),
    Kill("block", 50),
    Kill("file written", 9, rank=1, who="other"),
    Kill("rename checkpoint", 2, who="all"),
    *random_moments(2, 2, ["self", "all"]),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=1770)


def survive(campaign: Campaign) -> list[Done]:
    """Carry out all kills of a campaign; what each cost."""
    campaign.train()
    campaign.check_rows()
    campaign.check_folder(KEEP, KEEP_BEST)
    done = campaign.costs()
    print(table(done))
    assert [kill.kind for kill in done] == [kill.kind for kill in campaign.kills]
    assert all(kill.repeated_steps <= MOST_REPEATED for kill in done)
    return done


def test_a_run_that_is_killed_five_times_ends_as_if_it_was_not(log: Path, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "killed", log, RECIPE, SHORT, tmp_path / "undisturbed")
    survive(campaign)
    assert campaign.launches == 1
    assert_equal_runs(campaign.run, tmp_path / "undisturbed")


CAMPAIGNS = {
    "random": (random_moments(8, 0, ["self", "other", "all"]), RECIPE),
    "random_with_torchrun": (random_moments(8, 1, ["self", "other", "all", "torchrun"]), RECIPE),
    "saving": (SAVING, RECIPE),
    "committing": (COMMITTING, RECIPE),
    "small_files": (SMALL_FILES, RECIPE),
    "torchrun": (TORCHRUN, RECIPE),
    "in_foreground": (IN_FOREGROUND, [*RECIPE, "checkpoint.background=false"]),
}


def test_the_campaigns_are_of_fifty_kills() -> None:
    assert sum(len(kills) for kills, _ in CAMPAIGNS.values()) >= 50


@pytest.mark.long
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_campaign_of_kills_loses_nothing(log: Path, tmp_path: Path, name: str) -> None:
    kills, recipe = CAMPAIGNS[name]
    undisturbed = log.parent / "undisturbed"
    campaign = Campaign(tmp_path / "killed", log, recipe, kills, undisturbed)
    survive(campaign)
    assert_equal_runs(campaign.run, undisturbed)


STOPS = [
    Kill("step", 4, rank=1, signal="TERM"),
    Kill("block", 5, who="all", signal="TERM"),
    Kill("evaluated", rank=1, signal="TERM"),
    Kill("step", 6, who="torchrun", signal="TERM", delay=0.02),
    Kill("read", 2, who="torchrun", signal="TERM"),
    Kill("commit", 1, who="other", signal="TERM"),
    Kill("step", 4, who="everyone", signal="TERM"),
]


@pytest.mark.long
def test_what_is_asked_to_stop_trains_nothing_twice(log: Path, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "stopped", log, RECIPE, STOPS, tmp_path / "undisturbed", restarts=False)
    done = survive(campaign)
    assert [kill.repeated_steps for kill in done] == [0] * len(STOPS)
    assert_equal_runs(campaign.run, tmp_path / "undisturbed")


@pytest.mark.long
def test_each_start_may_have_another_number_of_ranks(log: Path, tmp_path: Path) -> None:
    kills = [
        Kill("step", 10, rank=1),
        Kill("block", 30),
        Kill("commit", 3, who="all"),
        Kill("step", 8, signal="TERM"),
        Kill("step", 7, rank=2, who="other"),
    ]
    without_dropout = [*RECIPE, "model.dropout=0"]  # its masks are each rank's own
    campaign = Campaign(
        tmp_path / "killed", log, without_dropout, kills, tmp_path / "undisturbed", world_sizes=[2, 1, 3, 1, 3, 2], restarts=False
    )
    survive(campaign)
    assert campaign.launches == len(kills) + 1
    assert_close_runs(campaign.run, tmp_path / "undisturbed", 1e-5)
