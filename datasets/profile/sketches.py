"""Sketches of a stream of values in fixed memory: how many are distinct, which are frequent, which columns share their values.

Hashes are 64-bit and well mixed, see `codes_of`. No sketch depends on how the stream is cut into chunks, except the counts
of `HeavyHitters`, whose bounds hold for every cut.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..ids import mix, string_codes

_EXACT = 2.0**53


def codes_of(values: pa.Array) -> np.ndarray:
    """Hashes uint64 [N] of integers, floats or strings without nulls; a whole float hashes like the integer."""
    if pa.types.is_large_string(values.type):
        return string_codes(values)
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind != "f":
        return mix(numbers.astype(np.int64, copy=False).view(np.uint64))
    whole = (np.abs(numbers) < _EXACT) & (numbers == np.floor(numbers))
    as_integers = np.where(whole, numbers, 0).astype(np.int64).view(np.uint64)
    # Bits of a fraction could be those of an integer: another mixing keeps the two apart.
    return mix(np.where(whole, as_integers, mix(numbers.view(np.uint64))))


class HyperLogLog:
    """Number of distinct hashes; standard error 0.81 % (Flajolet et al., AofA 2007), with Ertl's estimator (arXiv:1702.01284),
    which has no bias at small and middle counts."""

    PRECISION = 14
    RELATIVE_ERROR = 1.04 / 2 ** (PRECISION / 2)

    def __init__(self) -> None:
        self.registers = np.zeros(1 << self.PRECISION, np.uint8)

    def add(self, code_N: np.ndarray) -> None:
        """Take in hashes, uint64 [N]."""
        register_N = (code_N >> np.uint64(64 - self.PRECISION)).astype(np.int64)
        rest_N = code_N & np.uint64((1 << (64 - self.PRECISION)) - 1)
        # The exponent of the float is the place of the highest bit; integers below 2^50 are exact in it.
        rank_N = 64 - self.PRECISION + 1 - np.frexp(rest_N.astype(np.float64))[1]
        np.maximum.at(self.registers, register_N, rank_N.astype(np.uint8))

    def estimate(self) -> float:
        m, q = len(self.registers), 64 - self.PRECISION
        counts = np.bincount(self.registers, minlength=q + 2)
        z = m * _tau(1 - counts[q + 1] / m)
        for k in range(q, 0, -1):
            z = (z + counts[k]) / 2
        z += m * _sigma(counts[0] / m)
        return m * m / (2 * math.log(2) * z) if z < math.inf else 0.0


def _sigma(x: float) -> float:
    """x + sum over k of x^(2^k) 2^(k - 1)."""
    if x == 1.0:
        return math.inf
    total, factor = x, 1.0
    while True:
        x *= x
        before = total
        total += x * factor
        factor *= 2
        if total == before:
            return total


def _tau(x: float) -> float:
    """(1 - x - sum over k of (1 - x^(2^-k))^2 2^-k) / 3."""
    if x in (0.0, 1.0):
        return 0.0
    total, factor = 1 - x, 1.0
    while True:
        x = math.sqrt(x)
        before = total
        factor /= 2
        total -= (1 - x) ** 2 * factor
        if total == before:
            return total / 3


class HeavyHitters:
    """The frequent values and how often they occur (Misra and Gries, 1982; merged as in Agarwal et al., PODS 2012).

    A count is never above the true one, and below it by at most `error` <= occurrences / (capacity + 1). While no more than
    `capacity` values have occurred, all are held and the counts are exact: `error` is 0.
    """

    def __init__(self, kind: pa.DataType, capacity: int = 4096) -> None:
        self.capacity, self.error = capacity, 0
        self.values, self.counts = pa.array([], kind), np.zeros(0, np.int64)

    def add(self, values: pa.Array, count_N: np.ndarray) -> None:
        """Take in distinct values [N] and how often each occurred."""
        joined = pa.concat_arrays([self.values, values]).dictionary_encode()
        counts = np.bincount(joined.indices.to_numpy(), np.concatenate([self.counts, count_N]), len(joined.dictionary)).astype(np.int64)
        self.values, self.counts = joined.dictionary, counts
        if len(counts) > self.capacity:
            cut = int(np.partition(counts, -self.capacity - 1)[-self.capacity - 1])
            kept = np.flatnonzero(counts > cut)
            self.error += cut
            self.values, self.counts = self.values.take(pa.array(kept)), counts[kept] - cut

    def top(self, count: int) -> list[tuple[object, int]]:
        """The most frequent values with their counts, most frequent first; equal counts by value."""
        ascending = pc.array_sort_indices(self.values).to_numpy()
        order = ascending[np.argsort(-self.counts[ascending], kind="stable")][:count]
        return list(zip(self.values.take(pa.array(order)).to_pylist(), self.counts[order].tolist(), strict=True))


class SmallestCodes:
    """The smallest distinct hashes of a stream: a sample of its values that is the same for equal sets (Cohen and Kaplan, PODC 2007)."""

    def __init__(self, capacity: int = 1024) -> None:
        self.capacity, self.codes = capacity, np.zeros(0, np.uint64)

    def add(self, code_N: np.ndarray) -> None:
        """Take in hashes, uint64 [N]."""
        if len(self.codes) == self.capacity:
            code_N = code_N[code_N < self.codes[-1]]
        self.codes = np.union1d(self.codes, code_N)[: self.capacity]

    def jaccard(self, other: SmallestCodes) -> float:
        """Estimate of |A and B| / |A or B|; standard error at most 1 / (2 sqrt(capacity)). 0 where either is empty."""
        if not len(self.codes) or not len(other.codes):
            return 0.0
        union = np.union1d(self.codes, other.codes)[: min(self.capacity, other.capacity)]
        return float((np.isin(union, self.codes) & np.isin(union, other.codes)).mean())
