"""Who is in the synthetic world: its parameters, its users and its items, with what the log shows of them and what it hides.

Shapes: U users, I items, K tastes of a user, D directions of taste; 3 scores: CLICK, CONVERSION, DWELL.
"""

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

CLICK, CONVERSION, DWELL = range(3)
_AGES = {"under_18": 0.06, "18-24": 0.20, "25-34": 0.26, "35-44": 0.20, "45-54": 0.14, "55-64": 0.09, "65_plus": 0.05}
CATEGORIES, _BRANDS, _TAGS = 20, 300, 100
_ZIPF_SHIFT = 10.0  # added to the ranks, lest one user or item be a tenth of the log


class Manner(NamedTuple):
    """How users have taste."""

    directions: int  # D
    own: float  # share of a taste that neither the age band (one taste) nor a favourite category (several) explains
    shortlist: int  # an item of a history is the best liked of so many
    weight: float  # of taste on click and conversion, as a factor


_ONE_TASTE, _SEVERAL_TASTES = Manner(2, 0.25, 8, 1.0), Manner(8, 0.2, 32, 4.0)


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
    tastes: int = _parameter(1, 1, 16, "tastes of a user, who likes an item for the one that it meets best")
    history: int = _parameter(20, 1, 100, "most items in a user's history")
    user_zipf: float = _parameter(0.9, 0.0, 2.0, "exponent of the users' activity by rank")
    item_zipf: float = _parameter(0.9, 0.0, 2.0, "exponent of the items' popularity by rank")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, (low, high), whole = getattr(self, entry.name), entry.metadata["allowed"], isinstance(entry.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                raise ValueError(f"{entry.name} = {value!r}: must be {'a whole number' if whole else 'a number'} from {low} to {high}")

    @property
    def manner(self) -> Manner:
        return _ONE_TASTE if self.tastes == 1 else _SEVERAL_TASTES


class Side(NamedTuple):
    """The users, or the items: the attributes that the log shows, and the factors that it hides."""

    table: pa.Table
    weight: np.ndarray  # [U or I], share of the impressions
    lean: np.ndarray  # [U or I, 3], added to each score whatever is on the other side
    taste: np.ndarray  # [U, K, 2, D] or [I, 2, D], for the click and for the conversion's own part


def random_stream(world: World, purpose: int, chunk: int = 0) -> np.random.Generator:
    return np.random.default_rng([world.seed, purpose, chunk])


def sigmoid(score: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
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


def list_array(counts: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.concatenate([[0], counts.cumsum()]).astype(np.int32), values.astype(np.int64))


def make_users(world: World, category_taste: np.ndarray) -> Side:
    """The users, still without their history. Where they have several tastes, each lies near that of a category [categories, 2, D]."""
    rng, count, shown = random_stream(world, 1), world.users, 1 - world.idiosyncratic
    weight, normal = _zipf(rng, count, world.user_zipf), rng.standard_normal
    age = rng.choice(len(_AGES), count, p=list(_AGES.values()))
    habit = normal((count, 3))
    columns = {
        "user_id": np.arange(count),
        "age_band": pa.array(list(_AGES)).take(pa.array(age)),
        "active_days": rng.binomial(30, sigmoid(habit[:, CLICK])),
        "days_registered": np.exp(5.5 + 0.7 * habit[:, CONVERSION]).astype(np.int64),
        "minutes_per_day": np.exp(3 + 0.7 * habit[:, DWELL]).round(1),
    }
    lean = _blend(weight, (0.3 * shown, normal((len(_AGES), 3))[age]), (0.7 * shown, habit), (world.idiosyncratic, normal((count, 3))))
    shape, own = (world.tastes, *category_taste.shape[1:]), world.manner.own
    if world.tastes == 1:
        shared_taste = normal((len(_AGES), *shape))[age]
    else:
        appeal = normal((len(_AGES), CATEGORIES))[age] + rng.gumbel(size=(count, CATEGORIES))
        shared_taste = category_taste[appeal.argsort(axis=1)[:, -world.tastes :]]
    return Side(pa.table(columns), weight, lean, _blend(weight, (1 - own, shared_taste), (own, normal((count, *shape)))))


def make_items(world: World) -> tuple[Side, np.ndarray, np.ndarray]:
    """The items, the category [I] of each, and the taste [categories, 2, D] that the items of a category share."""
    rng, count, shown = random_stream(world, 2), world.items, 1 - world.idiosyncratic
    weight = _zipf(rng, count, world.item_zipf)
    category = rng.choice(CATEGORIES, count, p=_zipf(rng, CATEGORIES, 0.5, shift=1))
    brand = rng.choice(_BRANDS, count, p=_zipf(rng, _BRANDS, 0.8, shift=1))
    owner = np.repeat(np.arange(count), rng.integers(1, 6, count))
    owner, tag = np.divmod(np.unique(owner * _TAGS + rng.choice(_TAGS, len(owner), p=_zipf(rng, _TAGS, 0.5, shift=1))), _TAGS)
    tag_counts = np.bincount(owner)
    trait = np.column_stack([np.log(weight), rng.standard_normal((count, 2))])
    columns = {
        "item_id": np.arange(count),
        "category": pa.array([f"category_{number:02d}" for number in range(CATEGORIES)]).take(pa.array(category)),
        "brand": brand,
        "past_views": rng.poisson(weight * count * 500),
        "price": np.exp(3 - 0.8 * trait[:, CONVERSION]).round(2),
        "length_s": np.exp(4 + 0.6 * trait[:, DWELL]).round(1),
        "tags": list_array(tag_counts, tag),
    }
    category_lean, brand_lean, own_lean = (rng.standard_normal((groups, 3)) for groups in (CATEGORIES, _BRANDS, count))
    group_lean = (0.25 * shown, category_lean[category]), (0.1 * shown, brand_lean[brand])
    lean = _blend(weight, *group_lean, (0.65 * shown, trait), (world.idiosyncratic, own_lean))
    tastes = (rng.standard_normal((groups, 2, world.manner.directions)) for groups in (CATEGORIES, _TAGS, count))
    category_taste, tag_taste, own_taste = tastes
    mean_tag_taste = np.add.reduceat(tag_taste[tag], tag_counts.cumsum() - tag_counts) / tag_counts[:, None, None]
    taste = _blend(weight, (0.7, category_taste[category]), (0.2, mean_tag_taste), (0.1, own_taste))
    return Side(pa.table(columns), weight, lean, taste), category, category_taste
