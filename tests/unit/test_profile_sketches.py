"""Sketches against exact counts, within their stated errors, and the same however the stream is cut."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.ids import mix
from triptych.datasets.profile.sketches import HeavyHitters, HyperLogLog, SmallestCodes, codes_of

some_examples = settings(deadline=None, max_examples=60)


def hashes(values):
    return mix(np.asarray(values, np.uint64))


def cut(values, cuts):
    return np.split(values, sorted(cut % (len(values) + 1) for cut in cuts))


class TestCodes:
    def test_a_whole_float_hashes_like_the_integer(self):
        integers = codes_of(pa.array([0, -1, 7, 2**52]))
        assert (codes_of(pa.array([-0.0, -1.0, 7.0, 2.0**52])) == integers).all()

    def test_other_values_hash_apart(self):
        numbers = np.concatenate([np.arange(-500, 500) / 4, [np.inf, -np.inf, 1e300, -1e300]])
        assert len(set(codes_of(pa.array(numbers)).tolist())) == len(numbers)
        # The bits of a fraction, read as an integer.
        assert codes_of(pa.array([0.1]))[0] != codes_of(pa.array(np.array([0.1]).view(np.int64)))[0]

    def test_texts(self):
        texts = pa.array(["", "a", "b", "ab", "a"], pa.large_string())
        assert len(set(codes_of(texts).tolist())) == 4


class TestHyperLogLog:
    @pytest.mark.parametrize("distinct", [0, 1, 2, 10, 300, 5_000, 20_000, 45_000, 80_000, 300_000, 1_000_000])
    def test_is_within_four_standard_errors(self, distinct):
        sketch = HyperLogLog()
        for part in np.array_split(np.arange(distinct), 3):
            sketch.add(hashes(part))
            sketch.add(hashes(part))
        assert sketch.estimate() == pytest.approx(distinct, rel=4 * HyperLogLog.RELATIVE_ERROR)

    def test_the_mean_error_over_many_streams_is_the_stated_one(self):
        """Ertl's estimator has no bias where the classic one changes its formula, at 2.5 times the registers."""
        errors = []
        for stream in range(40):
            sketch = HyperLogLog()
            sketch.add(hashes(stream * 10**9 + np.arange(41_000)))
            errors.append(sketch.estimate() / 41_000 - 1)
        assert abs(np.mean(errors)) < 4 * HyperLogLog.RELATIVE_ERROR / np.sqrt(len(errors))
        assert np.std(errors) < 1.5 * HyperLogLog.RELATIVE_ERROR

    @some_examples
    @given(st.lists(st.integers(0, 2**64 - 1), max_size=60), st.lists(st.integers(0, 60), max_size=4))
    def test_does_not_depend_on_the_cuts(self, codes, cuts):
        codes = np.array(codes, np.uint64)
        whole, parts = HyperLogLog(), HyperLogLog()
        whole.add(codes)
        for part in cut(codes, cuts):
            parts.add(part)
        assert (whole.registers == parts.registers).all()

    @pytest.mark.parametrize("code, rank", [(0, 51), (1, 50), (2**49, 1), (2**50 - 1, 1), (2**48, 2)])
    def test_a_register_holds_the_place_of_the_first_one_bit(self, code, rank):
        sketch = HyperLogLog()
        sketch.add(np.array([(5 << 50) + code], np.uint64))
        assert sketch.registers[5] == rank and sketch.registers.sum() == rank


def heavy(values, capacity, parts=1, kind=None):
    kind = kind or pa.int64()
    sketch = HeavyHitters(kind, capacity)
    for part in np.array_split(np.asarray(values, object), parts):
        counted = Counter(part.tolist())
        sketch.add(pa.array(list(counted), kind), np.array(list(counted.values()), np.int64))
    return sketch


class TestHeavyHitters:
    @some_examples
    @given(st.lists(st.integers(0, 12), max_size=200), st.integers(1, 15), st.integers(1, 6))
    def test_counts_are_within_the_bound(self, values, capacity, parts):
        sketch, exact = heavy(values, capacity, parts), Counter(values)
        assert sketch.error <= len(values) / (capacity + 1)
        assert len(sketch.values) <= capacity
        held = dict(zip(sketch.values.to_pylist(), sketch.counts.tolist(), strict=True))
        for value, count in exact.items():
            assert count - sketch.error <= held.get(value, 0) <= count

    @some_examples
    @given(st.lists(st.text("abc", max_size=2), max_size=80), st.integers(1, 6))
    def test_are_exact_while_all_values_fit(self, values, parts):
        sketch = heavy(values, 13, parts, pa.large_string())
        assert sketch.error == 0
        exact = sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0].encode()))
        assert sketch.top(5) == exact[:5]

    def test_finds_the_head_of_a_long_tail(self):
        rng = np.random.default_rng(0)
        values = np.where(rng.random(60_000) < 0.1, 7, rng.integers(100, 50_000, 60_000))
        sketch = heavy(values, 500, parts=7)
        (value, count), *_ = sketch.top(1)
        exact = int((values == 7).sum())
        assert value == 7 and exact - 60_000 / 501 <= count <= exact


class TestSmallestCodes:
    @some_examples
    @given(st.lists(st.integers(0, 99)), st.lists(st.integers(0, 50), max_size=4))
    def test_hold_the_smallest_distinct_ones(self, values, cuts):
        codes, sketch = hashes(values), SmallestCodes(10)
        for part in cut(codes, cuts):
            sketch.add(part)
        assert sketch.codes.tolist() == sorted(set(codes.tolist()))[:10]

    @pytest.mark.parametrize("first, second", [((0, 30), (20, 60)), ((0, 5), (5, 9)), ((0, 5), (0, 5)), ((0, 0), (0, 5))])
    def test_overlap_of_small_sets_is_exact(self, first, second):
        a, b = SmallestCodes(), SmallestCodes()
        a.add(hashes(np.arange(*first)))
        b.add(hashes(np.arange(*second)))
        sets = set(range(*first)), set(range(*second))
        assert a.jaccard(b) == b.jaccard(a) == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))

    @pytest.mark.parametrize("shared", [0, 1_000, 30_000, 60_000])
    def test_overlap_of_large_sets_is_within_four_standard_errors(self, shared):
        a, b = SmallestCodes(), SmallestCodes()
        a.add(hashes(np.arange(60_000)))
        b.add(hashes(np.arange(60_000 - shared, 120_000 - shared)))
        assert a.jaccard(b) == pytest.approx(shared / (120_000 - shared), abs=4 / (2 * np.sqrt(1024)))
