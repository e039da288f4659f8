"""The profile of a column is what a naive count over all rows gives; the sample is the same however rows are cut."""

import math
import statistics
import subprocess
import sys
from collections import Counter
from datetime import date, datetime
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.profile.columns import ColumnTally
from triptych.datasets.profile.profile import profile_files
from triptych.datasets.profile.sample import RowSample, list_codes
from triptych.datasets.schema import InputError

some_examples = settings(deadline=None, max_examples=60)
floats = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 3.0]), st.none())


def write(path, row_group_size=None, **columns):
    pq.write_table(pa.table(columns), path, row_group_size, compression="zstd", write_page_checksum=True)
    return str(path)


def tally(kind, element, parts, type_=None):
    counted = ColumnTally("x", kind, element, "")
    for part in parts:
        counted.add(pa.array(part, type_))
    return counted.finish()


def cut(values, cuts):
    edges = [0, *sorted(cut % (len(values) + 1) for cut in cuts), len(values)]
    return [values[a:b] for a, b in pairwise(edges)]


class TestColumn:
    @some_examples
    @given(st.lists(floats, max_size=40), st.lists(st.integers(0, 40), max_size=3))
    def test_of_floats_is_the_naive_count(self, values, cuts):
        found = tally("number", "number", cut(values, cuts), pa.float64())
        known = [value for value in values if value is not None]
        finite = [value for value in known if math.isfinite(value)]
        assert (found.rows, found.nulls) == (len(values), len(values) - len(known))
        assert found.nan == sum(map(math.isnan, known)) and found.infinite == sum(map(math.isinf, known))
        assert (found.min, found.max) == ((min(finite), max(finite)) if finite else (None, None))
        assert found.whole == all(value.is_integer() for value in finite)
        if finite:
            assert found.mean == pytest.approx(statistics.fmean(finite), rel=1e-9, abs=1e-6)
            assert found.std == pytest.approx(statistics.pstdev(finite), rel=1e-6, abs=1e-3)
        assert found.distinct == len({value for value in known if not math.isnan(value)})

    def test_minus_zero_is_zero(self):
        found = tally("number", "number", [[0.0, -0.0], [-0.0, 1.0]])
        assert (found.distinct, found.top) == (2, [(0.0, 3), (1.0, 1)])

    @pytest.mark.filterwarnings("error")
    @some_examples
    @given(st.lists(st.sampled_from([0.0, 1e-9, 1.0, 3.5e7, -1e154, 1e300, -1e300, 1.5e308]), min_size=1, max_size=20), st.integers(0, 20))
    def test_of_huge_floats_does_not_overflow(self, values, middle):
        found = tally("number", "number", cut(values, [middle]), pa.float64())
        exact = [Fraction(value) for value in values]
        mean = sum(exact) / len(exact)
        variance = sum((value - mean) ** 2 for value in exact) / len(exact)
        largest = max(map(abs, values))
        assert found.mean == pytest.approx(float(mean), rel=1e-9, abs=1e-14 * largest)
        scale = Fraction(largest or 1.0)
        assert found.std == pytest.approx(math.sqrt(variance / scale**2) * float(scale), rel=1e-9, abs=1e-14 * largest)

    @some_examples
    @given(st.lists(st.one_of(st.integers(-5, 5), st.none()), max_size=60), st.lists(st.integers(0, 60), max_size=3))
    def test_of_integers_has_exact_heads(self, values, cuts):
        found = tally("integer", "integer", cut(values, cuts), pa.int16())
        counts = sorted(Counter(value for value in values if value is not None).values(), reverse=True)
        assert found.distinct == len(counts) and found.distinct_is_exact and found.values == sum(counts)
        for head, share in found.head_share.items():
            assert share == sum(counts[:head]) / sum(counts)

    @some_examples
    @given(st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=4)), max_size=30), st.integers(0, 30))
    def test_of_lists_counts_lengths_and_elements(self, lists, middle):
        found = tally("list", "integer", cut(lists, [middle]), pa.list_(pa.int32()))
        known = [values for values in lists if values is not None]
        elements = [value for values in known for value in values]
        assert found.nulls == len(lists) - len(known) and found.empty_lists == sum(not values for values in known)
        assert found.null_elements == elements.count(None) and found.values == len(elements) - elements.count(None)
        assert found.distinct == len(set(elements) - {None})
        if known:
            assert (found.length_min, found.length_max) == (min(map(len, known)), max(map(len, known)))
            assert found.length_mean == pytest.approx(len(elements) / len(known))

    def test_counts_of_many_values_are_approximate_and_say_so(self):
        values = np.random.default_rng(0).permutation(np.repeat(np.arange(30_000), 2)).tolist()
        found = tally("integer", "integer", cut([*values, *[7] * 6_000], [20_000, 40_000]))
        assert not found.distinct_is_exact and found.distinct == pytest.approx(30_000, rel=0.03)
        assert 6_002 / 66_000 - found.head_share_error <= found.head_share[1] <= 6_002 / 66_000
        assert found.head_share_error <= 1 / 4_097


class TestProfile:
    def test_of_all_types_in_one_table(self, tmp_path):
        path = write(
            tmp_path / "a.parquet",
            row_group_size=2,
            text=pa.array(["a", None, "a"], pa.string()),
            coded=pa.array(["x", "y", "x"]).dictionary_encode(),
            flag=[True, False, None],
            day=[date(2024, 1, 1), date(2024, 1, 3), None],
            moment=pa.array([datetime(2024, 1, 1), None, datetime(2024, 1, 2)], pa.timestamp("us")),
            vector=pa.array([[0.5, 1.5], [2.0, math.nan], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
            words=[["p", "q"], [], None],
            empty=pa.nulls(3),
            other=[{"a": 1}, None, {"a": 2}],
        )
        found = profile_files([path])
        assert (found.rows, found.files, found.row_groups, len(found.sample)) == (3, 1, 2, 3)
        metadata = pq.read_metadata(path)
        sizes = [metadata.row_group(g).column(c).total_compressed_size for g in range(2) for c in range(metadata.num_columns)]
        assert found.bytes == sum(sizes)
        columns = found.columns
        kinds = ["text", "text", "boolean", "moment", "moment", "list", "list", "null", "other"]
        assert [column.kind for column in columns.values()] == kinds
        assert columns["text"].top == [("a", 2)] and columns["text"].nulls == 1
        assert columns["coded"].top == [("x", 2), ("y", 1)]
        assert (columns["flag"].mean, columns["flag"].nulls) == (0.5, 1)
        day_ms = 86_400_000
        assert columns["day"].max - columns["day"].min == 2 * day_ms and columns["moment"].max - columns["moment"].min == day_ms
        assert (columns["vector"].length_min, columns["vector"].length_max, columns["vector"].nan) == (2, 2, 1)
        assert (columns["words"].empty_lists, columns["words"].nulls, columns["words"].distinct) == (1, 1, 2)
        assert columns["empty"].is_constant and columns["other"].nulls == 1
        assert set(found.sample.column_names) == set(columns) - {"empty", "other"}
        assert found.as_json()["columns"]["text"]["head_share"] == {"1": 1.0, "10": 1.0, "100": 1.0}

    def test_does_not_depend_on_files_and_row_groups(self, tmp_path):
        rng = np.random.default_rng(0)
        ids, numbers = rng.integers(0, 900, 1_000), rng.normal(size=1_000)
        lists = [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 4, 1_000)]
        whole = profile_files([write(tmp_path / "w.parquet", id=ids, number=numbers, seen=lists)], sample_rows=100)
        cuts = [(0, 10), (10, 10), (10, 700), (700, 1_000)]
        paths = [
            write(tmp_path / f"{i}.parquet", 37, id=ids[a:b], number=numbers[a:b], seen=pa.array(lists[a:b], pa.list_(pa.int64())))
            for i, (a, b) in enumerate(cuts)
        ]
        parts = profile_files(paths, sample_rows=100)
        assert parts.sample.equals(whole.sample) and len(whole.sample) == 100
        for name in ("id", "number", "seen"):
            a, b = whole.columns[name].as_json(), parts.columns[name].as_json()
            assert a.pop("mean") == pytest.approx(b.pop("mean")) and a.pop("std") == pytest.approx(b.pop("std"))
            assert a == b

    def test_types_of_several_files_are_joined(self, tmp_path):
        """As pandas writes them: a column with nulls becomes float, an empty list has elements of no type."""
        paths = [
            write(tmp_path / "a.parquet", n=pa.array([1, 2], pa.int32()), seen=pa.array([[], []], pa.list_(pa.null())), t=pa.nulls(2)),
            write(tmp_path / "b.parquet", n=[3.0, None], seen=[["a"], ["b"]], t=["x", "y"]),
            write(tmp_path / "c.parquet", n=pa.nulls(1), seen=pa.nulls(1), t=pa.array(["x"]).dictionary_encode()),
        ]
        columns = profile_files(paths).columns
        assert (columns["n"].kind, columns["n"].max, columns["n"].nulls, columns["n"].whole) == ("number", 3.0, 2, True)
        assert (columns["seen"].element, columns["seen"].empty_lists, columns["seen"].distinct, columns["seen"].nulls) == ("text", 2, 2, 1)
        assert (columns["t"].kind, columns["t"].top) == ("text", [("x", 2), ("y", 1)])

    @pytest.mark.parametrize("names", [[""], ["", "hash"], ["hash", "x"]])
    def test_a_column_may_have_any_name(self, tmp_path, names):
        found = profile_files([write(tmp_path / "a.parquet", **{name: [i, i + 1, i + 1] for i, name in enumerate(names)})])
        assert found.sample.column_names == names == list(found.columns)
        assert [sorted(found.sample.column(name).to_pylist()) for name in names] == [[i, i + 1, i + 1] for i in range(len(names))]

    def test_progress_ends_with_all_rows(self, tmp_path):
        seen = []
        profile_files([write(tmp_path / "a.parquet", x=range(10))], progress=lambda done, total: seen.append((done, total)))
        assert seen[-1] == (10, 10)


class TestRefusals:
    def test_files_that_do_not_go_together(self, tmp_path):
        number, text = write(tmp_path / "a.parquet", x=[1]), write(tmp_path / "b.parquet", x=["1"])
        with pytest.raises(InputError, match=r"b\.parquet: column 'x' is string, but int64 in .*a\.parquet; write it the same"):
            profile_files([number, text])
        more = write(tmp_path / "c.parquet", x=[1], y=[1])
        with pytest.raises(InputError, match=r"c\.parquet: column 'y' is not in .*a\.parquet"):
            profile_files([number, more])
        with pytest.raises(InputError, match=r"a\.parquet: no column 'y', which is in .*c\.parquet"):
            profile_files([more, number])

    def test_no_rows(self, tmp_path):
        with pytest.raises(InputError, match=r"a\.parquet: no rows"):
            profile_files([write(tmp_path / "a.parquet", x=pa.array([], pa.int64()))])

    def test_two_columns_of_one_name(self, tmp_path):
        pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"]), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet: 2 columns are named 'x'"):
            profile_files([str(tmp_path / "a.parquet")])

    def test_a_flipped_bit(self, tmp_path):
        path = tmp_path / "a.parquet"
        write(path, x=np.random.default_rng(0).integers(0, 2**60, 5_000))
        damaged = bytearray(path.read_bytes())
        damaged[20_000] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: cannot be read \(.*\)$"):
            profile_files([str(path)])


FLIP_EACH_BIT = """
import sys
from pathlib import Path
from triptych.datasets.profile.profile import profile_files
from triptych.datasets.schema import InputError

path = Path(sys.argv[1])
content, refused = path.read_bytes(), 0
for bit in range(8 * (len(content) - 8 - int.from_bytes(content[-8:-4], "little")), 8 * (len(content) - 8)):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        profile_files([str(path)])
    except InputError as error:
        assert str(error).startswith(f"{path}:") and chr(10) not in str(error), error
        refused += 1
print(refused)
"""


def test_a_damaged_footer_is_refused_and_ends_no_process(tmp_path):
    """Arrow ends the process when it is asked for the sizes of a damaged column chunk."""
    path = write(tmp_path / "a.parquet", x=[1, 2, 3])
    done = subprocess.run([sys.executable, "-c", FLIP_EACH_BIT, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert int(done.stdout) > 100


class TestSample:
    @some_examples
    @given(st.integers(1, 300), st.integers(1, 60), st.lists(st.integers(0, 300), max_size=5))
    def test_is_the_same_for_every_cut(self, rows, size, cuts):
        samples = []
        for parts in (cut(range(rows), []), cut(range(rows), cuts)):
            sample, first = RowSample({"x": ("integer", "integer")}, size), 0
            for part in parts:
                sample.add(first, {"x": pa.array(part, pa.int64())})
                first += len(part)
            samples.append(sample.rows().column("x").to_pylist())
        assert samples[0] == samples[1]
        assert len(set(samples[0])) == min(rows, size)

    def test_takes_early_and_late_rows_alike_and_in_random_order(self):
        sample = RowSample({"x": ("integer", "integer")}, 2_000)
        for first in range(0, 100_000, 10_000):
            sample.add(first, {"x": pa.array(np.arange(first, first + 10_000))})
        drawn = sample.rows().column("x").to_numpy()
        # Standard error of the mean of 2,000 uniform numbers: 0.29 / sqrt(2000) = 0.0065.
        assert drawn.mean() / 100_000 == pytest.approx(0.5, abs=0.026)
        assert abs(np.corrcoef(drawn, np.arange(2_000))[0, 1]) < 4 / math.sqrt(2_000)

    def test_another_seed_draws_another_sample(self):
        drawn = []
        for seed in (0, 1):
            sample = RowSample({"x": ("integer", "integer")}, 10, seed)
            sample.add(0, {"x": pa.array(range(1_000))})
            drawn.append(set(sample.rows().column("x").to_pylist()))
        assert drawn[0] != drawn[1]

    @some_examples
    @given(st.lists(st.one_of(st.none(), st.lists(st.sampled_from(["", "a", "b", "ab"]), max_size=3)), min_size=1, max_size=20))
    def test_equal_lists_have_equal_codes(self, lists):
        codes = list_codes(pa.array(lists, pa.list_(pa.string())), "text").to_pylist()
        for a, code_a in zip(lists, codes, strict=True):
            for b, code_b in zip(lists, codes, strict=True):
                assert (a == b) == (code_a == code_b)
