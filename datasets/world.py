"""A synthetic world of impressions whose true probabilities are known: a log, a catalogue and the truth, as parquet.

    write_world(World(rows=200_000, seed=0), Path("data/world"))

Users, items and the pages of an app have hidden factors, partly shown by their attributes. From these follow three scores: of the click, of
the conversion given the click, of the dwell given the click. Labels are drawn from the scores, and the truth is written beside them.
Shapes: N rows, U users, I items, K tastes of a user, D directions of taste; 3 scores: CLICK, CONVERSION, DWELL.
"""

import os
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .population import CATEGORIES, CLICK, CONVERSION, DWELL, World, list_array, make_items, make_users, random_stream, sigmoid

_WEIGHTS = np.array([(0.35, 0.40, 0.35), (0.80, 0.90, 0.45), (0.45, 0.40, 0.35)])  # of the user, of the item, of taste; on each score
_PAGES = {"home": 0.45, "feed": 0.30, "search": 0.17, "related": 0.08}  # shares of the impressions
_SLOTS = np.array([12, 30, 20, 6])  # a page has positions 1 to slots
_FADE = np.array([0.6, 0.4, 0.9, 0.5])  # fall of the click score per log(position)
_REACH = np.array([1.0, 0.9, 0.5, 0.7])  # exponent on popularity: 1 shows items as popular as they are, less favours the tail
_BIAS = np.array([(0.0, 0.0, 0.0), (-0.2, -0.4, 0.3), (0.9, 0.6, 0.1), (0.3, 0.1, -0.3)])  # of the pages on the scores
_CHUNK_ROWS, _CHUNK_USERS, _CALIBRATION_ROWS = 20_000, 1_000, 40_000  # each drawn from one random stream; row groups have no more rows
_LEAST_GROUPS = 8  # row groups of a file, so that each of several ranks finds one
_START_MS, _ROW_MS = 1_704_067_200_000, 6_000  # 2024-01-01 UTC; mean time between rows: 200,000 rows are two weeks
_EAGERNESS = 3.0  # how sharply an item of a history is chosen from its shortlist


class _Impressions(NamedTuple):
    user: np.ndarray  # [N]
    item: np.ndarray  # [N]
    page: np.ndarray  # [N]
    position: np.ndarray  # [N], from 1


def _cumulative(weight: np.ndarray) -> np.ndarray:
    total = weight.cumsum()
    return total / total[-1]


def _logistic(rate: float, auc: float, score: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) that make `score` [N] probabilities of that mean, weighted, and of that AUC against outcomes drawn from them."""
    order = score.argsort()
    score, weight = score[order], weight[order] / weight.sum()
    flat, steep = 0.0, 10.0
    for _ in range(20):
        slope, low, high = (flat + steep) / 2, -200.0, 200.0
        for _ in range(40):
            intercept = (low + high) / 2
            positive = weight * sigmoid(score, slope, intercept)
            low, high = (intercept, high) if positive.sum() < rate else (low, intercept)
        negative = weight - positive
        reached = (positive * (negative.cumsum() - negative / 2)).sum() / (positive.sum() * negative.sum())
        flat, steep = (slope, steep) if reached < auc else (flat, slope)
    return slope, intercept


class _Truth:
    """Which impressions happen, and what follows from them."""

    def __init__(self, world: World) -> None:
        rng = random_stream(world, 3)
        self.items, category, category_taste = make_items(world)
        self.users = make_users(world, category_taste)
        self.correlation = world.correlation
        self.active = _cumulative(self.users.weight)
        mix = np.exp(0.5 * rng.standard_normal((len(_PAGES), CATEGORIES)))[:, category]
        self.displayed = [_cumulative(self.items.weight**reach * mix[page]) for page, reach in enumerate(_REACH)]
        focus = np.exp(0.3 * rng.standard_normal((len(_PAGES), 1, world.manner.directions)))
        self.focus = focus / np.sqrt((focus**2).sum(axis=2, keepdims=True))
        self.weights = _WEIGHTS.copy()
        self.weights[2, [CLICK, CONVERSION]] *= world.manner.weight
        seen = self.draw(rng, _CALIBRATION_ROWS)
        self.level, self.spread = np.zeros(2), np.ones(2)  # of the liking; that of one taste has mean 0 and deviation 1 as it is
        if world.tastes > 1:
            best = self.liking(seen)[:, [CLICK, CONVERSION]]
            self.level, self.spread = best.mean(axis=0), best.std(axis=0)
        scores = self.scores(seen)
        self.click = _logistic(world.click_rate, world.click_auc, scores[:, CLICK], np.ones(len(scores)))
        clicks = sigmoid(scores[:, CLICK], *self.click)
        self.conversion = _logistic(world.conversion_rate, world.conversion_auc, scores[:, CONVERSION], clicks)
        self.dwell = world.dwell_seconds / np.average(np.exp(scores[:, DWELL]), weights=clicks)
        self.users_table = self.users.table.append_column("history", self.history(world))

    def draw(self, rng: np.random.Generator, count: int, user: np.ndarray | None = None) -> _Impressions:
        """What these users [N] are shown, or `count` users who come as they are active."""
        user = np.searchsorted(self.active, rng.random(count), side="right") if user is None else user
        page = rng.choice(len(_PAGES), count, p=list(_PAGES.values()))
        position = 1 + (_SLOTS[page] * rng.random(count) ** 1.5).astype(np.int64)
        item, chance = np.empty(count, np.int64), rng.random(count)
        for number, displayed in enumerate(self.displayed):
            item[page == number] = np.searchsorted(displayed, chance[page == number], side="right")
        return _Impressions(user, item, page, position)

    def liking(self, seen: _Impressions) -> np.ndarray:
        """How the item meets the user's taste, the best of several [N, 3]; people stay with what they like to click."""
        user, item = self.users.taste[seen.user], self.items.taste[seen.item, None]
        best = (user * item * self.focus[seen.page, None]).sum(axis=3).max(axis=1)
        return ((best - self.level) / self.spread)[:, [CLICK, CONVERSION, CLICK]]

    def scores(self, seen: _Impressions) -> np.ndarray:
        """The three scores [N, 3]."""
        factors = np.stack([self.users.lean[seen.user], self.items.lean[seen.item], self.liking(seen)], axis=1)
        factors[..., CONVERSION] *= np.sqrt(1 - self.correlation**2)
        factors[..., CONVERSION] += self.correlation * factors[..., CLICK]
        scores = _BIAS[seen.page] + (self.weights * factors).sum(axis=1)
        scores[:, CLICK] -= _FADE[seen.page] * np.log(seen.position)
        return scores

    def outcomes(self, seen: _Impressions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p(click), p(conversion | click), E[seconds of dwell | click]: [N] each."""
        click, conversion, dwell = self.scores(seen).T
        return sigmoid(click, *self.click), sigmoid(conversion, *self.conversion), self.dwell * np.exp(dwell)

    def history(self, world: World) -> pa.ChunkedArray:
        """For each user up to `world.history` items clicked before the log begins, for some none; each for one of the tastes."""
        lists, shortlist = [], world.manner.shortlist
        for chunk, first in enumerate(range(0, world.users, _CHUNK_USERS)):
            rng, user = random_stream(world, 4, chunk), np.arange(first, min(first + _CHUNK_USERS, world.users))
            lengths = rng.integers(0, world.history + 1, len(user))
            seen = self.draw(rng, lengths.sum() * shortlist, np.repeat(user, lengths * shortlist))
            noise = rng.gumbel(size=len(seen.user))
            taste = self.users.taste[seen.user, rng.integers(0, world.tastes, lengths.sum()).repeat(shortlist), CLICK]
            meeting = (taste * self.items.taste[seen.item, CLICK] * self.focus[seen.page, 0]).sum(axis=1)
            best = (_EAGERNESS * meeting + noise).reshape(-1, shortlist).argmax(axis=1)[:, None]
            lists.append(list_array(lengths, np.take_along_axis(seen.item.reshape(-1, shortlist), best, axis=1)[:, 0]))
        return pa.chunked_array(lists)


def _chunk(world: World, truth: _Truth, chunk: int) -> pa.Table:
    """The _CHUNK_ROWS rows from chunk * _CHUNK_ROWS on, the same however long the log is."""
    rng, count = random_stream(world, 5, chunk), _CHUNK_ROWS
    seen = truth.draw(rng, count)
    ctr, cvr, dwell = truth.outcomes(seen)
    click = rng.random(count) < ctr
    conversion = click & (rng.random(count) < cvr)
    noise = np.exp(world.dwell_noise * rng.standard_normal(count) - world.dwell_noise**2 / 2)  # of mean 1
    moment = np.sort(rng.integers(0, (_ROW_MS - 1) * count, count)) + np.arange(count)  # no two alike
    columns: dict[str, Any] = {
        "time_ms": _START_MS + chunk * count * _ROW_MS + moment,
        "scenario": pa.array(list(_PAGES)).take(pa.array(seen.page)),
        "position": seen.position,
    }
    for table, rows in ((truth.users_table, seen.user), (truth.items.table, seen.item)):
        columns |= {name: table[name].take(pa.array(rows)) for name in table.column_names}
    dwell_ms = np.where(click, np.maximum(1, 1000 * dwell * noise), 0).round().astype(np.int64)
    columns |= {"click": click.astype(np.int64), "conversion": conversion.astype(np.int64), "dwell_ms": dwell_ms}
    return pa.table(columns | {"true_ctr": ctr, "true_cvr": cvr, "true_dwell": dwell})


def _log(world: World, truth: _Truth, first: int, last: int, progress: Callable[[int, int], None]) -> Iterator[pa.Table]:
    """Rows first to last - 1 of the log."""
    for chunk in range(first // _CHUNK_ROWS, -(-last // _CHUNK_ROWS)):
        start, stop = max(first, chunk * _CHUNK_ROWS), min(last, (chunk + 1) * _CHUNK_ROWS)
        yield _chunk(world, truth, chunk).slice(start - chunk * _CHUNK_ROWS, stop - start)
        progress(stop, world.rows)


def _write(path: Path, rows: int, tables: Iterator[pa.Table]) -> None:
    """Writes under another name first, so that no half-written file has the name `path`."""
    half, head = path.with_name(path.name + ".part"), next(tables)
    try:
        with pq.ParquetWriter(half, head.schema, compression="zstd", write_page_checksum=True) as writer:
            for table in chain([head], tables):
                writer.write_table(table, row_group_size=min(_CHUNK_ROWS, -(-rows // _LEAST_GROUPS)))
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_world(world: World, out: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Writes the log, split by time into train.parquet (80 %), valid.parquet and test.parquet (10 % each), and the items as items.parquet.

    Args:
        out: a folder, made where it is missing; files of these names in it are replaced.
        progress: called with the rows of the log written so far, and the rows it will have.

    Returns: the rows of each file by its name. Memory grows with users and items, not with rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    truth = _Truth(world)
    cuts, written = (0, world.rows * 8 // 10, world.rows * 9 // 10, world.rows), {}
    for name, (first, last) in zip(("train.parquet", "valid.parquet", "test.parquet"), pairwise(cuts), strict=True):
        _write(out / name, last - first, _log(world, truth, first, last, progress or (lambda done, total: None)))
        written[name] = last - first
    _write(out / "items.parquet", world.items, iter([truth.items.table]))
    return written | {"items.parquet": world.items}
