"""What is counted of one column while it streams by: nulls, range, mean, distinct values, the frequent ones, list lengths.

A column has a kind, whatever its type in each file: integer, number, text, boolean, moment (dates and timestamps, in
milliseconds), list, or other (nothing is counted but nulls).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .sketches import HeavyHitters, HyperLogLog, SmallestCodes, codes_of

HEADS = (1, 10, 100)
NUMERIC = ("integer", "number", "boolean")
LARGEST = float(np.finfo(np.float32).max)
"""Numbers beyond it are infinite to a model."""
_INT64_END = 2.0**63
_ARROW = {"integer": pa.int64(), "boolean": pa.int64(), "moment": pa.int64(), "number": pa.float64(), "text": pa.large_string()}


def kind_of(kind: pa.DataType) -> str:
    """The kind of a type; "null" where the type says nothing."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "list"
    tests = {
        "boolean": pa.types.is_boolean(kind),
        "integer": pa.types.is_integer(kind),
        "number": pa.types.is_floating(kind),
        "text": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "moment": pa.types.is_date(kind) or pa.types.is_timestamp(kind),
        "null": pa.types.is_null(kind),
    }
    return next((name for name, holds in tests.items() if holds), "other")


def common_kind(kinds: set[str]) -> str | None:
    """One kind for the same column of several files; None where they do not go together."""
    kinds = kinds - {"null"}
    if len(kinds) <= 1:
        return next(iter(kinds), "null")
    if kinds <= set(NUMERIC):
        return "number" if "number" in kinds else "integer"
    return None


def plain(values: pa.Array, kind: str) -> pa.Array:
    """int64, float64 or large_string [N] of a column of that kind, nulls kept."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        values = pc.cast(values, pa.timestamp("ms"), safe=False)
    # Unsafe: an unsigned number above 2^63 becomes negative, and is told by that.
    values = pc.cast(values, _ARROW[kind], safe=False)
    # -0.0 is another value than 0.0 to Arrow's counts; adding 0.0 makes it 0.0.
    return pc.add(values, 0.0) if kind == "number" else values


@dataclass
class ColumnProfile:
    """What is known of a column. Of a list column, the values are those in the lists."""

    name: str
    type: str
    kind: str
    element: str
    """Kind of the values: the column's own, or that of a list's elements."""
    rows: int = 0
    nulls: int = 0
    nan: int = 0
    infinite: int = 0
    whole: bool = True
    """All finite numbers are whole."""
    min: float | int | None = None
    max: float | int | None = None
    mean: float | None = None
    std: float | None = None
    values: int = 0
    """Values counted: without nulls and NaN."""
    distinct: int = 0
    distinct_is_exact: bool = True
    head_share: dict[int, float] = field(default_factory=dict)
    """Share of the values that the most frequent 1, 10, 100 take; at most `head_share_error` too low for each value counted."""
    head_share_error: float = 0.0
    top: list[tuple[object, int]] = field(default_factory=list)
    length_min: int | None = None
    length_max: int | None = None
    length_mean: float | None = None
    empty_lists: int = 0
    null_elements: int = 0
    all_values: list[object] | None = None
    """Every distinct value, where few enough occur to hold all."""
    smallest: SmallestCodes = field(default_factory=SmallestCodes)

    @property
    def is_list(self) -> bool:
        return self.kind == "list"

    @property
    def is_numeric(self) -> bool:
        return self.kind in NUMERIC

    @property
    def holds_whole_numbers(self) -> bool:
        """Integers, or floats that are what integers with nulls become."""
        in_range = self.kind != "number" or self.min is None or self.max is None or -_INT64_END <= self.min <= self.max < _INT64_END
        return self.kind in NUMERIC and self.whole and self.nan == 0 and self.infinite == 0 and in_range

    @property
    def is_constant(self) -> bool:
        """One value in all rows, or nothing but nulls."""
        return not self.is_list and self.kind != "other" and (self.distinct + (self.nulls > 0) + (self.nan > 0)) <= 1

    def as_json(self) -> dict[str, object]:
        """Plain values under the names above; what does not apply to the kind is left out."""
        hidden = ("smallest", "all_values", "name")
        facts = {key: value for key, value in vars(self).items() if key not in hidden and value is not None}
        if not self.is_list:
            facts = {
                key: value for key, value in facts.items() if not key.startswith("length_") and key not in ("empty_lists", "null_elements")
            }
        return facts | {"head_share": {str(k): v for k, v in self.head_share.items()}, "top": [list(pair) for pair in self.top]}


class ColumnTally:
    """Counts one column, chunk by chunk, in fixed memory."""

    def __init__(self, name: str, kind: str, element: str, type_name: str) -> None:
        self.profile = ColumnProfile(name, type_name, kind, element)
        self.distinct, self.smallest = HyperLogLog(), SmallestCodes()
        self.heavy = HeavyHitters(_ARROW[element]) if element in _ARROW else None
        self.finite, self.mean, self.squares, self.total_length = 0, 0.0, 0.0, 0
        self.unit = 1.0
        """Power of two that mean and squares are counted in."""

    def add(self, values: pa.Array) -> pa.Array:
        """Count a chunk; returns it as `plain`, a list as it is."""
        profile = self.profile
        profile.rows += len(values)
        profile.nulls += values.null_count
        if profile.kind == "list":
            if pa.types.is_null(values.type):
                values = pa.nulls(len(values), pa.list_(pa.null()))
            self._add_lengths(values)
            flat = pc.list_flatten(values)
            profile.null_elements += flat.null_count
            if self.heavy is not None and kind_of(flat.type) != "null":
                self._add_values(plain(flat, profile.element).drop_null())
            return values
        if self.heavy is None:
            return values
        values = plain(values, profile.kind) if kind_of(values.type) != "null" else values.cast(_ARROW[profile.kind])
        self._add_values(values.drop_null())
        return values

    def _add_lengths(self, lists: pa.Array) -> None:
        profile, lengths = self.profile, pc.list_value_length(lists).drop_null().to_numpy(zero_copy_only=False)
        if len(lengths):
            low, high = int(lengths.min()), int(lengths.max())
            profile.length_min = low if profile.length_min is None else min(low, profile.length_min)
            profile.length_max = high if profile.length_max is None else max(high, profile.length_max)
            profile.empty_lists += int((lengths == 0).sum())
            self.total_length += int(lengths.sum())

    def _add_values(self, values: pa.Array) -> None:
        counted = pc.value_counts(values)
        distinct, count_N = counted.field("values"), counted.field("counts").to_numpy(zero_copy_only=False)
        if pa.types.is_floating(distinct.type):
            is_nan = np.isnan(distinct.to_numpy(zero_copy_only=False))
            self.profile.nan += int(count_N[is_nan].sum())
            distinct, count_N = distinct.filter(pa.array(~is_nan)), count_N[~is_nan]
        if len(distinct) == 0:
            return
        self.profile.values += int(count_N.sum())
        codes = codes_of(distinct)
        self.distinct.add(codes)
        self.smallest.add(codes)
        assert self.heavy is not None
        self.heavy.add(distinct, count_N)
        if self.profile.element != "text":
            self._add_moments(distinct.to_numpy(zero_copy_only=False), count_N)

    def _add_moments(self, number_N: np.ndarray, count_N: np.ndarray) -> None:
        """Distinct numbers and their counts into range, mean and variance (Chan, Golub and LeVeque, 1983)."""
        profile, finite = self.profile, np.isfinite(number_N)
        profile.infinite += int(count_N[~finite].sum())
        number_N, count_N = number_N[finite], count_N[finite]
        if len(number_N) == 0:
            return
        profile.whole &= bool((number_N == np.floor(number_N)).all())
        low, high = number_N.min().item(), number_N.max().item()
        profile.min = low if profile.min is None else min(low, profile.min)
        profile.max = high if profile.max is None else max(high, profile.max)
        count = int(count_N.sum())
        self._scale_to(max(abs(low), abs(high)))
        number_N = number_N / self.unit
        mean = float(np.average(number_N, weights=count_N))
        squares = float((count_N * (number_N - mean) ** 2).sum())
        together = self.finite + count
        self.squares += squares + (mean - self.mean) ** 2 * self.finite * count / together
        self.mean += (mean - self.mean) * count / together
        self.finite = together

    def _scale_to(self, largest: float) -> None:
        """Take a unit in which no square of a number up to `largest` overflows. Division by a power of two is exact."""
        unit = max(self.unit, 2.0 ** (math.frexp(largest)[1] - 1))
        ratio, self.unit = self.unit / unit, unit
        self.mean, self.squares = self.mean * ratio, self.squares * ratio * ratio

    def finish(self) -> ColumnProfile:
        profile, heavy = self.profile, self.heavy
        profile.smallest = self.smallest
        if self.finite:
            profile.mean, profile.std = self.mean * self.unit, math.sqrt(self.squares / self.finite) * self.unit
        if profile.kind == "list":
            profile.length_mean = self.total_length / max(1, profile.rows - profile.nulls)
        if heavy is not None and profile.values:
            profile.distinct_is_exact = heavy.error == 0
            profile.distinct = (
                len(heavy.values) if heavy.error == 0 else round(min(max(self.distinct.estimate(), len(heavy.values)), profile.values))
            )
            top = heavy.top(max(HEADS))
            profile.top = top[:10]
            profile.head_share = {head: sum(count for _, count in top[:head]) / profile.values for head in HEADS}
            profile.head_share_error = heavy.error / profile.values
            profile.all_values = heavy.values.to_pylist() if heavy.error == 0 else None
        return profile
