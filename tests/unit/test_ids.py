"""Raw ids become table rows: equal values meet, different values do not, and what fits no table is named."""

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.fitted import Fitted
from triptych.datasets.ids import bucketise, mix, string_codes, table_rows
from triptych.datasets.parquet.decode import plain_column
from triptych.datasets.schema import Feature, InputError, TableIds

many_examples = settings(deadline=None, max_examples=150)
FEATURE = Feature(name="watched", column="video_id", kind="id", table="video")
GOLDEN = 0x9E3779B97F4A7C15
STRING_TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]
# Surrogates are no text in UTF-8.
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=8)
int64s = st.integers(-(2**63), 2**63 - 1)


def hashed(values, rows=1 << 62):
    return table_rows(values, FEATURE, TableIds(name="video", rows=rows), Fitted(), "f.parquet: row group 0").tolist()


def indexed(values, rows=10):
    return table_rows(values, FEATURE, TableIds(name="video", rows=rows, ids="index"), Fitted(), "f.parquet: row group 0").tolist()


def refusal(function, values):
    """The message that refuses ids: one line that names file, row group, column and feature."""
    with pytest.raises(InputError) as refused:
        function(values)
    message, where = str(refused.value), "f.parquet: row group 0: column 'video_id' (feature 'watched')"
    assert "\n" not in message and message.startswith(where)
    return message.removeprefix(where)


def splitmix64(number):
    """The next output of a SplitMix64 generator in this state, in Python's integers."""
    x = (number + GOLDEN) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def naive_code(text):
    data = text.encode()
    return splitmix64(sum((byte + 1) * pow(GOLDEN, place + 1, 2**64) for place, byte in enumerate(data)) % 2**64 ^ len(data))


def strided(values, kind):
    """The same values in the middle of a longer array, so that offsets do not start at 0."""
    return pa.array(["before", "", *values, "after"], kind).slice(2, len(values))


class TestMix:
    def test_it_is_splitmix64(self):
        """The generator's published outputs from state 0."""
        states = np.array([0, GOLDEN, 2 * GOLDEN % 2**64], np.uint64)
        assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    @many_examples
    @given(st.lists(st.integers(0, 2**64 - 1), max_size=8))
    def test_it_equals_its_formula_and_leaves_its_input_alone(self, values):
        array = np.array(values, np.uint64)
        assert mix(array).tolist() == [splitmix64(value) for value in values]
        assert array.tolist() == values


class TestStringCodes:
    @many_examples
    @given(texts)
    def test_they_equal_the_polynomial_byte_by_byte(self, values):
        assert string_codes(pa.array(values, pa.string())).tolist() == [naive_code(text) for text in values]

    @many_examples
    @given(texts, st.sampled_from(STRING_TYPES))
    def test_they_depend_on_the_value_alone(self, values, kind):
        expected = string_codes(pa.array(values, pa.string())).tolist()
        table = pa.table({"c": pa.chunked_array([strided(values, pa.string()).cast(kind), pa.array(values, pa.string()).cast(kind)])})
        assert string_codes(plain_column(table, "c")).tolist() == expected * 2
        assert string_codes(strided(values, pa.large_string())).tolist() == expected

    def test_long_and_short_strings_side_by_side(self):
        values = ["", "x" * 5000, "", "x" * 4999, "y"]
        assert string_codes(pa.array(values)).tolist() == [naive_code(text) for text in values]

    def test_200_000_different_strings_have_different_codes(self):
        draw = random.Random(0)
        letters = "".join(draw.sample("abcdefghijklmnopqrstuvwxyz", 8))
        numbered = [f"{prefix}{i}" for prefix in ("", "user_", "ü") for i in range(40_000)]
        permuted = ["".join(draw.sample(letters, 8)) for _ in range(60_000)]
        binary = [format(i, "b").replace("0", "\0") for i in range(10_000)]
        zeros = ["a" + "\0" * i for i in range(300)] + ["\0" * i for i in range(300)]
        pairs = ["ab", "ba", "aab", "aba", "baa", "a", "b", "c", "", "é", "e\u0301"]
        values = list({*numbered, *permuted, *binary, *zeros, *pairs, *(f"{i:036x}" for i in range(40_000))})
        assert len(values) > 200_000
        assert len(np.unique(string_codes(pa.array(values)))) == len(values)


def sequences():
    """What ids look like in logs: in a row, with a stride, as time, as text."""
    i = np.arange(200_000)
    yield from [(f"stride {stride}", pa.array(i * stride)) for stride in (1, -1, 4096, 2**40, 1000)]
    yield "text", pa.array([f"user_{n}" for n in i.tolist()])
    yield "text of one length", pa.array([f"{n:08d}" for n in i.tolist()])


class TestHash:
    @many_examples
    @given(st.lists(int64s, max_size=8), st.integers(1, 2**40))
    def test_rows_of_integers_are_the_mixed_value_modulo_rows(self, values, rows):
        assert hashed(pa.array(values, pa.int64()), rows) == [splitmix64(value % 2**64) % rows for value in values]

    @many_examples
    @given(texts, st.integers(1, 2**40))
    def test_rows_of_strings_are_the_code_modulo_rows(self, values, rows):
        assert hashed(pa.array(values, pa.string()), rows) == [naive_code(text) % rows for text in values]

    @many_examples
    @given(st.lists(st.integers(0, 127), max_size=8))
    def test_a_number_has_one_row_in_every_type(self, values):
        numbers = [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint64(), pa.float32(), pa.float64()]
        expected = hashed(pa.array(values, pa.int64()))
        for kind in [*numbers, pa.dictionary(pa.int8(), pa.int64())]:
            assert hashed(plain_column(pa.table({"c": pa.array(values, kind)}), "c")) == expected
        assert hashed(pa.array([-1, *values, 99], pa.int32()).slice(1, len(values))) == expected

    def test_truth_values_are_the_numbers_0_and_1(self):
        assert hashed(pa.array([True, False])) == hashed(pa.array([1, 0]))

    @pytest.mark.parametrize("rows", [1000, 1024, 997])
    def test_rows_are_spread_evenly(self, rows):
        """A chi-square statistic of rows - 1 degrees of freedom; six standard deviations are one in a billion."""
        for name, values in sequences():
            counts = np.bincount(hashed(values, rows), minlength=rows)
            expected = len(values) / rows
            assert len(counts) == rows
            assert abs(((counts - expected) ** 2 / expected).sum() - (rows - 1)) < 6 * np.sqrt(2 * (rows - 1)), name

    @many_examples
    @given(st.lists(st.integers(0, 2**64 - 1), max_size=8))
    def test_unsigned_ids_keep_their_bits(self, values):
        assert hashed(pa.array(values, pa.uint64()), 2**63) == [splitmix64(value) % 2**63 for value in values]

    @pytest.mark.parametrize("values", [[1.0, 2.5], [1.0, np.nan], [np.inf], [1e300]])
    def test_numbers_that_are_no_ids_are_refused(self, values):
        assert refusal(hashed, pa.array(values)).startswith(": ids must be whole numbers or strings (")


class TestIndex:
    @many_examples
    @given(st.lists(st.integers(0, 9), max_size=8))
    def test_ids_are_rows_whatever_their_width(self, values):
        for kind in (pa.int64(), pa.int8(), pa.uint64(), pa.float32()):
            assert indexed(pa.array(values, pa.int64()).cast(kind)) == values

    @pytest.mark.parametrize(
        ("values", "first", "count"),
        [
            (pa.array([0, 10, 11]), 10, 2),
            (pa.array([3, -1]), -1, 1),
            (pa.array([2**40]), 2**40, 1),
            (pa.array([4, 2**64 - 1, 2**63], pa.uint64()), 2**64 - 1, 2),
        ],
    )
    def test_an_id_outside_the_table_is_named(self, values, first, count):
        outside = f": id {first} is outside table 'video' of 10 rows ({count} such values); "
        assert refusal(indexed, values) == outside + 'raise its rows or use ids = "hash"'

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
    def test_strings_are_no_rows_whatever_they_hold(self, kind):
        strings = " holds strings, but table 'video' takes row numbers as ids; "
        assert refusal(indexed, pa.array(["1", "7"], kind)) == strings + 'use ids = "hash" or "vocabulary"'


class TestBuckets:
    @many_examples
    @given(
        st.lists(st.integers(-20, 20).map(lambda half: half / 2), unique=True, min_size=1, max_size=6).map(sorted),
        st.lists(st.integers(-25, 25).map(lambda half: half / 2), max_size=8),
    )
    def test_the_id_is_the_count_of_edges_at_or_below(self, edges, numbers):
        feature = Feature(name="age", kind="id", table="age", buckets=tuple(edges))
        assert bucketise(np.array(numbers), feature).to_pylist() == [sum(edge <= number for edge in edges) for number in numbers]
