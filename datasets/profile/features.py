"""How a column becomes a feature: an id with a table, a list of ids, a number with its buckets, a vector; and the null's default."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..ids import mix, string_codes
from . import names
from .columns import ColumnProfile
from .roles import Roles, Sample

_FEW, _CODES = 64, 10_000
"""So many distinct whole numbers are categories; and codes without gaps up to so many."""
_ALIKE, _ALIKE_BY_NAME, _LEAST_IDS = 0.5, 0.2, 100
_LONGEST_LIST, _BUCKETS = 100, 24


@dataclass
class FeatureGuess:
    """A feature, as the recipe has it, and why."""

    column: str
    side: str
    why: str
    keys: dict[str, Any]
    """Keys of `[[features]]`, other than name, column and side."""
    suffix: str = ""
    """Of the name, where a column is read twice."""


@dataclass
class TableGuess:
    """A table named after the column whose ids it holds."""

    column: str
    distinct: int
    rows: int
    dim: int
    shared_with: list[str] = field(default_factory=list)


def table_of(column: ColumnProfile, others: Sequence[ColumnProfile], universe: int) -> TableGuess:
    """A hashed table for one or more columns of the same ids.

    Few values get as many rows as keep them apart, many get the next power of two above twice their number.
    Args:
        universe: distinct values of all these columns, at least.
    """
    rows = max(16, 1 << math.ceil(math.log2(2 * max(universe, 1))))
    values = column.all_values
    if values is not None and not others and 0 < len(values) <= 512:
        while rows < 16 * len(values) and _collides(values, rows):
            rows *= 2
    dim = 4 if universe <= 4 else 8 if universe < 50_000 else 16 if universe < 1_000_000 else 32 if universe < 50_000_000 else 64
    return TableGuess(column.name, universe, rows, dim, [other.name for other in others])


def _collides(values: Sequence[Any], rows: int) -> bool:
    """Whether two of the values share a row of a hashed table, see `ids.table_rows`."""
    is_text = isinstance(values[0], str)
    codes = string_codes(pa.array(values, pa.large_string())) if is_text else mix(np.array(values).astype(np.int64).view(np.uint64))
    return len(np.unique(codes % np.uint64(rows))) < len(values)


def shares_ids(column: ColumnProfile, entity: ColumnProfile, side: str) -> bool:
    """Whether a column holds the same ids as the user's or the item's: by overlap, and by less of it where the names agree too."""
    if column.element != entity.element and not {column.element, entity.element} <= {"integer", "number"}:
        return False
    jaccard = column.smallest.jaccard(entity.smallest)
    same_name = names.shares_entity(column.name, entity.name, side)
    if column.is_list and jaccard >= _ALIKE and min(column.distinct, entity.distinct) >= _LEAST_IDS:
        return True
    return same_name and jaccard >= _ALIKE_BY_NAME and (column.is_list or names.entity_score(column.name, side) is not None)


def guess_features(column: ColumnProfile, roles: Roles, sample: Sample, splits: Sequence[ColumnProfile]) -> list[FeatureGuess]:
    """How a column is read: once, or a number twice, as it is and in buckets.

    Args:
        splits: the same column in the other files, whose nulls count too.
    """
    side, why = roles.sides.get(column.name, "context"), roles.why.get(column.name, "")
    has_nulls = any(part.nulls for part in (column, *splits))
    if column.is_list:
        return [_list(column, side, why)]
    as_id = _why_id(column, roles)
    if as_id is not None:
        default = {"default": _absent(column, splits)} if has_nulls else {}
        return [FeatureGuess(column.name, side, _both(as_id, why), {"kind": "id", **default})]
    guesses = _numbers(column, side, why, sample, splits, has_nulls)
    return [guess for guess in guesses if not guess.suffix or guess.column + guess.suffix not in roles.sides]


def _both(first: str, second: str) -> str:
    return f"{first}; {second}" if second else first


def _list(column: ColumnProfile, side: str, why: str) -> FeatureGuess:
    if column.element == "number":
        keys: dict[str, Any] = {"kind": "vector", "size": column.length_max}
        return FeatureGuess(column.name, side, _both(f"{column.length_max} numbers in each row", why), keys)
    text = f"{column.distinct:,} ids, {column.length_mean:.1f} a row, at most {column.length_max}"
    keys = {"kind": "ids", "max_length": max(1, min(column.length_max or 1, _LONGEST_LIST))}
    return FeatureGuess(column.name, side, _both(text, why), keys)


def _why_id(column: ColumnProfile, roles: Roles) -> str | None:
    """Why a column is read as an id; None for a number."""
    about = "" if column.distinct_is_exact else "about "
    if column.name in (roles.user, roles.item):
        return f"names the {'user' if column.name == roles.user else 'item'}; {about}{column.distinct:,} of them"
    if column.kind == "text" or column.kind == "boolean":
        return f"{about}{column.distinct:,} values"
    if not column.holds_whole_numbers or column.min is None or column.max is None:
        return None
    if names.is_id(column.name):
        return f"{about}{column.distinct:,} codes, by its name"
    if column.distinct <= _FEW:
        return f"{column.distinct} whole numbers"
    without_gaps = column.min in (0, 1) and column.distinct >= 0.9 * (column.max - column.min + 1)
    return f"{column.distinct} codes without gaps" if without_gaps and column.distinct <= _CODES else None


def _absent(column: ColumnProfile, splits: Sequence[ColumnProfile]) -> int | str:
    """A value that does not occur, to stand for null."""
    parts = (column, *splits)
    if column.kind == "boolean":
        return 0
    if column.kind == "text":
        return "(null)" if any("" in (part.all_values or ()) for part in parts) else ""
    low, high = min(part.min for part in parts if part.min is not None), max(part.max for part in parts if part.max is not None)
    if column.type.startswith("uint"):
        return int(high) + 1
    return -1 if low >= 0 else int(low) - 1


def _numbers(
    column: ColumnProfile, side: str, why: str, sample: Sample, splits: Sequence[ColumnProfile], has_nulls: bool
) -> list[FeatureGuess]:
    """A number, on a scale of about 1, and the same in buckets, which say what a straight line cannot."""
    number_N = sample.numbers[column.name]
    number_N = number_N[np.isfinite(number_N)]
    if len(number_N) == 0:
        number_N = np.zeros(1)
    mean, deviation = float(number_N.mean()), float(number_N.std())
    from_zero = all(part.min is None or part.min >= 0 for part in (column, *splits))
    has_tail = from_zero and (deviation > mean or float(np.quantile(number_N, 0.999)) > mean + 4 * deviation)
    spread = float(np.log1p(number_N).std()) if has_tail else deviation
    keys: dict[str, Any] = {"kind": "dense"} | ({"transform": "log1p"} if has_tail else {})
    keys["scale"] = float(f"{1 / max(spread, 1e-6):.2g}")
    default = {"default": float(f"{np.median(number_N):.4g}")} if has_nulls else {}
    about = f"{column.distinct:,} numbers from {column.min:g} to {column.max:g}{', a long tail' if has_tail else ''}"
    guesses = [FeatureGuess(column.name, side, _both(about, why), keys | default)]
    edges = _edges(number_N)
    if len(edges) > 2:
        bucketed = {"kind": "id", "buckets": edges, **default}
        guesses.append(FeatureGuess(column.name, side, f"{column.name} again, in buckets of about the same size", bucketed, "_bucket"))
    return guesses


def _edges(number_N: np.ndarray) -> list[float]:
    quantiles = np.quantile(number_N, np.linspace(0, 1, _BUCKETS + 1)[1:-1], method="lower")
    return sorted({float(f"{edge:.6g}") for edge in quantiles})


def safe_name(name: str, taken: set[str]) -> str:
    """A name of a feature, table or task: without dots, slashes or @, and not taken yet."""
    safe = re.sub(r"[./@\s\x00-\x1f]+", "_", name).strip("_") or "column"
    while safe in taken:
        safe += "_"
    taken.add(safe)
    return safe
