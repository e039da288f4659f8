"""A synthetic world of impressions whose true probabilities are known: a log, a catalogue and the truth, as parquet.

    write_world(World(rows=200_000, seed=0), Path("data/world"))

Users, items and the pages of an app have hidden factors, partly shown by their attributes. From these follow three scores: of the click, of
the conversion given the click, of the dwell given the click. Labels are drawn from the scores, and the truth is written beside them.
Shapes: N rows, U users, I items, D directions of taste; 3 scores: CLICK, CONVERSION, DWELL.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLICK, CONVERSION, DWELL = range(3)
_WEIGHTS = np.array([(0.35, 0.40, 0.35), (0.80, 0.90, 0.45), (0.45, 0.40, 0.35)])  # of the user, of the item, of taste; on each score
_DIRECTIONS, _OWN_TASTE = 2, 0.25  # of taste; and the share of a user's taste that the age band does not explain
_AGES = {"under_18": 0.06, "18-24": 0.20, "25-34": 0.26, "35-44": 0.20, "45-54": 0.14, "55-64": 0.09, "65_plus": 0.05}
_PAGES = {"home": 0.45, "feed": 0.30, "search": 0.17, "related": 0.08}  # shares of the impressions
_SLOTS = np.array([12, 30, 20, 6])  # a page has positions 1 to slots
_FADE = np.array([0.6, 0.4, 0.9, 0.5])  # fall of the click score per log(position)
_REACH = np.array([1.0, 0.9, 0.5, 0.7])  # exponent on popularity: 1 shows items as popular as they are, less favours the tail
_BIAS = np.array([(0.0, 0.0, 0.0), (-0.2, -0.4, 0.3), (0.9, 0.6, 0.1), (0.3, 0.1, -0.3)])  # of the pages on the scores
_CATEGORIES, _BRANDS, _TAGS = 20, 300, 100
_ZIPF_SHIFT = 10.0  # added to the ranks, lest one user or item be a tenth of the log
_CHUNK_ROWS, _CHUNK_USERS, _CALIBRATION_ROWS = 20_000, 1_000, 40_000  # each drawn from one random stream; row groups have no more rows
_LEAST_GROUPS = 8  # row groups of a file, so that each of several ranks finds one
_START_MS, _ROW_MS = 1_704_067_200_000, 6_000  # 2024-01-01 UTC; mean time between rows: 200,000 rows are two weeks
_HISTORY, _SHORTLIST, _EAGERNESS = 20, 8, 3.0  # most items in a history, each the best liked of a shortlist, chosen that sharply


def _parameter(default: float, low: float, high: float, meaning: str) -> Any:
    return field(default=default, metadata={"allowed": (low, high), "help": meaning})


@dataclass(frozen=True)
class World:
    """What `write_world` draws. Each parameter is given as default, lowest, highest, meaning. ValueError names one out of its range."""

    rows: int = _parameter(200_000, 10, 10**12, "impressions in the log, over its three files")
    users: int = _parameter(22_000, 10, 10**8, "users, with ids 0 to users - 1; the least active may not appear in a short log")
    items: int = _parameter(5_200, 10, 10**8, "items, with ids 0 to items - 1")
    seed: int = _parameter(0, 0, 2**32 - 1, "the same parameters give the same bytes, another seed another world")
    correlation: float = _parameter(0.7, -1.0, 1.0, "of what drives conversion and what drives click: 1 the same, 0 unrelated")
    idiosyncratic: float = _parameter(0.12, 0.0, 1.0, "share of the users' and items' own effects that no attribute shows, only the id")
    click_rate: float = _parameter(0.20, 0.01, 0.5, "mean probability of a click")
    click_auc: float = _parameter(0.82, 0.6, 0.9, "AUC that the true click probability reaches")
    conversion_rate: float = _parameter(0.25, 0.01, 0.5, "mean probability of a conversion over the clicks")
    conversion_auc: float = _parameter(0.80, 0.6, 0.9, "AUC that the true conversion probability reaches over the clicks")
    dwell_seconds: float = _parameter(30.0, 1.0, 3600.0, "mean dwell over the clicks")
    dwell_noise: float = _parameter(0.6, 0.0, 2.0, "standard deviation of log(dwell) around what user, item and page determine")
    user_zipf: float = _parameter(0.9, 0.0, 2.0, "exponent of the users' activity by rank")
    item_zipf: float = _parameter(0.9, 0.0, 2.0, "exponent of the items' popularity by rank")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, (low, high), whole = getattr(self, entry.name), entry.metadata["allowed"], isinstance(entry.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                raise ValueError(f"{entry.name} = {value!r}: must be {'a whole number' if whole else 'a number'} from {low} to {high}")


class _Side(NamedTuple):
    """The users, or the items: the attributes that the log shows, and the factors that it hides."""

    table: pa.Table
    weight: np.ndarray  # [U or I], share of the impressions
    lean: np.ndarray  # [U or I, 3], added to each score whatever is on the other side
    taste: np.ndarray  # [U or I, 2, D], for the click and for the conversion's own part


class _Impressions(NamedTuple):
    user: np.ndarray  # [N]
    item: np.ndarray  # [N]
    page: np.ndarray  # [N]
    position: np.ndarray  # [N], from 1


def _random(world: World, purpose: int, chunk: int = 0) -> np.random.Generator:
    return np.random.default_rng([world.seed, purpose, chunk])


def _sigmoid(score: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    return 1 / (1 + np.exp(-slope * score - intercept))


def _blend(weight: np.ndarray, *parts: tuple[float, np.ndarray]) -> np.ndarray:
    """Sum of `(share of the variance, values)`; it and each part have mean 0 and standard deviation 1 over the impressions."""

    def standard(values: np.ndarray) -> np.ndarray:
        centred = values - np.average(values, axis=0, weights=weight)
        spread = np.sqrt(np.average(centred**2, axis=0, weights=weight))
        return centred / np.where(spread > 1e-9, spread, 1)

    return standard(sum(np.sqrt(share) * standard(values) for share, values in parts))


def _zipf(rng: np.random.Generator, count: int, exponent: float, shift: float = _ZIPF_SHIFT) -> np.ndarray:
    """Shares that sum to 1, in an order that the index does not tell."""
    weight = rng.permutation((shift + np.arange(count)) ** -float(exponent))
    return weight / weight.sum()


def _cumulative(weight: np.ndarray) -> np.ndarray:
    total = weight.cumsum()
    return total / total[-1]


def _lists(counts: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.concatenate([[0], counts.cumsum()]).astype(np.int32), values.astype(np.int64))


def _users(world: World) -> _Side:
    """The users, still without their history."""
    rng, count, shown = _random(world, 1), world.users, 1 - world.idiosyncratic
    weight, normal = _zipf(rng, count, world.user_zipf), rng.standard_normal
    age = rng.choice(len(_AGES), count, p=list(_AGES.values()))
    habit = normal((count, 3))
    columns = {
        "user_id": np.arange(count),
        "age_band": pa.array(list(_AGES)).take(pa.array(age)),
        "active_days": rng.binomial(30, _sigmoid(habit[:, CLICK])),
        "days_registered": np.exp(5.5 + 0.7 * habit[:, CONVERSION]).astype(np.int64),
        "minutes_per_day": np.exp(3 + 0.7 * habit[:, DWELL]).round(1),
    }
    lean = _blend(weight, (0.3 * shown, normal((len(_AGES), 3))[age]), (0.7 * shown, habit), (world.idiosyncratic, normal((count, 3))))
    age_taste, own_taste = normal((len(_AGES), 2, _DIRECTIONS))[age], normal((count, 2, _DIRECTIONS))
    return _Side(pa.table(columns), weight, lean, _blend(weight, (1 - _OWN_TASTE, age_taste), (_OWN_TASTE, own_taste)))


def _items(world: World) -> tuple[_Side, np.ndarray]:
    """The items, and the category [I] of each."""
    rng, count, shown = _random(world, 2), world.items, 1 - world.idiosyncratic
    weight = _zipf(rng, count, world.item_zipf)
    category = rng.choice(_CATEGORIES, count, p=_zipf(rng, _CATEGORIES, 0.5, shift=1))
    brand = rng.choice(_BRANDS, count, p=_zipf(rng, _BRANDS, 0.8, shift=1))
    owner = np.repeat(np.arange(count), rng.integers(1, 6, count))
    owner, tag = np.divmod(np.unique(owner * _TAGS + rng.choice(_TAGS, len(owner), p=_zipf(rng, _TAGS, 0.5, shift=1))), _TAGS)
    tag_counts = np.bincount(owner)
    trait = np.column_stack([np.log(weight), rng.standard_normal((count, 2))])
    columns = {
        "item_id": np.arange(count),
        "category": pa.array([f"category_{number:02d}" for number in range(_CATEGORIES)]).take(pa.array(category)),
        "brand": brand,
        "past_views": rng.poisson(weight * count * 500),
        "price": np.exp(3 - 0.8 * trait[:, CONVERSION]).round(2),
        "length_s": np.exp(4 + 0.6 * trait[:, DWELL]).round(1),
        "tags": _lists(tag_counts, tag),
    }
    category_lean, brand_lean, own_lean = (rng.standard_normal((groups, 3)) for groups in (_CATEGORIES, _BRANDS, count))
    group_lean = (0.25 * shown, category_lean[category]), (0.1 * shown, brand_lean[brand])
    lean = _blend(weight, *group_lean, (0.65 * shown, trait), (world.idiosyncratic, own_lean))
    category_taste, tag_taste, own_taste = (rng.standard_normal((groups, 2, _DIRECTIONS)) for groups in (_CATEGORIES, _TAGS, count))
    mean_tag_taste = np.add.reduceat(tag_taste[tag], tag_counts.cumsum() - tag_counts) / tag_counts[:, None, None]
    taste = _blend(weight, (0.7, category_taste[category]), (0.2, mean_tag_taste), (0.1, own_taste))
    return _Side(pa.table(columns), weight, lean, taste), category


def _logistic(rate: float, auc: float, score: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) that make `score` [N] probabilities of that mean, weighted, and of that AUC against outcomes drawn from them."""
    order = score.argsort()
    score, weight = score[order], weight[order] / weight.sum()
    flat, steep = 0.0, 10.0
    for _ in range(20):
        slope, low, high = (flat + steep) / 2, -200.0, 200.0
        for _ in range(40):
            intercept = (low + high) / 2
            positive = weight * _sigmoid(score, slope, intercept)
            low, high = (intercept, high) if positive.sum() < rate else (low, intercept)
        negative = weight - positive
        reached = (positive * (negative.cumsum() - negative / 2)).sum() / (positive.sum() * negative.sum())
        flat, steep = (slope, steep) if reached < auc else (flat, slope)
    return slope, intercept


class _Truth:
    """Which impressions happen, and what follows from them."""

    def __init__(self, world: World) -> None:
        rng = _random(world, 3)
        self.users, (self.items, category) = _users(world), _items(world)
        self.correlation = world.correlation
        self.active = _cumulative(self.users.weight)
        mix = np.exp(0.5 * rng.standard_normal((len(_PAGES), _CATEGORIES)))[:, category]
        self.displayed = [_cumulative(self.items.weight**reach * mix[page]) for page, reach in enumerate(_REACH)]
        focus = np.exp(0.3 * rng.standard_normal((len(_PAGES), 1, _DIRECTIONS)))
        self.focus = focus / np.sqrt((focus**2).sum(axis=2, keepdims=True))
        scores = self.scores(self.draw(rng, _CALIBRATION_ROWS))
        self.click = _logistic(world.click_rate, world.click_auc, scores[:, CLICK], np.ones(len(scores)))
        clicks = _sigmoid(scores[:, CLICK], *self.click)
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
        """How the item meets the user's taste [N, 3]; people stay with what they like to click."""
        user, item = self.users.taste[seen.user], self.items.taste[seen.item]
        return (user * item * self.focus[seen.page]).sum(axis=2)[:, [CLICK, CONVERSION, CLICK]]

    def scores(self, seen: _Impressions) -> np.ndarray:
        """The three scores [N, 3]."""
        factors = np.stack([self.users.lean[seen.user], self.items.lean[seen.item], self.liking(seen)], axis=1)
        factors[..., CONVERSION] *= np.sqrt(1 - self.correlation**2)
        factors[..., CONVERSION] += self.correlation * factors[..., CLICK]
        scores = _BIAS[seen.page] + (_WEIGHTS * factors).sum(axis=1)
        scores[:, CLICK] -= _FADE[seen.page] * np.log(seen.position)
        return scores

    def outcomes(self, seen: _Impressions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p(click), p(conversion | click), E[seconds of dwell | click]: [N] each."""
        click, conversion, dwell = self.scores(seen).T
        return _sigmoid(click, *self.click), _sigmoid(conversion, *self.conversion), self.dwell * np.exp(dwell)

    def history(self, world: World) -> pa.ChunkedArray:
        """For each user up to _HISTORY items clicked before the log begins, for some none."""
        lists = []
        for chunk, first in enumerate(range(0, world.users, _CHUNK_USERS)):
            rng, user = _random(world, 4, chunk), np.arange(first, min(first + _CHUNK_USERS, world.users))
            lengths = rng.integers(0, _HISTORY + 1, len(user))
            seen = self.draw(rng, lengths.sum() * _SHORTLIST, np.repeat(user, lengths * _SHORTLIST))
            urge = _EAGERNESS * self.liking(seen)[:, CLICK] + rng.gumbel(size=len(seen.user))
            best = urge.reshape(-1, _SHORTLIST).argmax(axis=1)[:, None]
            lists.append(_lists(lengths, np.take_along_axis(seen.item.reshape(-1, _SHORTLIST), best, axis=1)[:, 0]))
        return pa.chunked_array(lists)


def _chunk(world: World, truth: _Truth, chunk: int) -> pa.Table:
    """The _CHUNK_ROWS rows from chunk * _CHUNK_ROWS on, the same however long the log is."""
    rng, count = _random(world, 5, chunk), _CHUNK_ROWS
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
