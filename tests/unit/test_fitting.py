"""The fitting pass equals numpy and a Counter over all rows at once, on any number of ranks and however row groups are cut."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import as_lists
from triptych.datasets.fitted import Fitted
from triptych.datasets.fitting import NUM_QUANTILES, gather, joined, needs_fitting
from triptych.datasets.ids import string_codes
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.files import read_slices
from triptych.datasets.parquet.listing import Listing, list_slices
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

TABLES = (TableIds(name="word", rows=9, ids="vocabulary", min_count=2), TableIds(name="item", rows=6, ids="vocabulary"))
FEATURES = (
    Feature(name="price", kind="dense", transform="standard", default=1),
    Feature(name="price_share", column="price", kind="dense", transform="quantile", default=1),
    Feature(name="vector", kind="vector", size=2, transform="standard", scale=0.5),
    Feature(name="vector_share", column="vector", kind="vector", size=2, transform="quantile"),
    Feature(name="page", kind="id", table="word", default="home"),
    Feature(name="tags", kind="ids", table="word"),
    Feature(name="item", kind="id", table="item"),
    Feature(name="seen", kind="ids", table="item", max_length=1),
)
SCHEMA = Schema(DataSection(root="."), TABLES, FEATURES, (Label(name="ctr", kind="binary", label="click"),))
ARROW = pa.schema(
    {
        "price": pa.float64(), "vector": pa.list_(pa.float32(), 2), "page": pa.string(), "tags": pa.list_(pa.string()),
        "item": pa.int64(), "seen": pa.list_(pa.int64()), "click": pa.int8(),
    }
)  # fmt: skip
words, items = st.sampled_from(["home", "a", "b", "é", "", "c", "d"]), st.integers(-4, 6)
small = st.floats(-1e6, 1e6, width=32)
one_row = st.fixed_dictionaries(
    {
        "price": st.one_of(st.none(), small, st.just(2.0)),
        "vector": st.lists(small, min_size=2, max_size=2),
        "page": st.one_of(st.none(), words),
        "tags": st.lists(words, max_size=3),
        "item": items,
        "seen": st.one_of(st.none(), st.lists(items, max_size=3)),
        "click": st.just(0),
    }
)
logs = st.lists(one_row, min_size=1, max_size=12).filter(lambda rows: any(row["price"] is not None for row in rows))
some_examples = settings(deadline=None, max_examples=25)


def write(folder, rows, row_group_rows):
    path = str(folder / "f.parquet")
    pq.write_table(pa.Table.from_pylist(rows, ARROW), path, row_group_rows)
    return list_slices(SCHEMA, [path], labels=True)


def cut(listing, num_rows):
    parts = [
        part._replace(start=start, first_row=part.first_row + start, rows=min(num_rows, part.rows - start))
        for part in listing.slices
        for start in range(0, part.rows, num_rows)
    ]
    return Listing(parts, listing.types)


def fit(listing, world_size=1, schema=SCHEMA):
    return joined(schema, listing, [gather(schema, listing, rank=rank, world_size=world_size) for rank in range(world_size)])


def parts_of(fitted):
    """Everything that a model reads, to the bit."""
    quantiles = {name: [array.tobytes() for array in (*q.values_D, *q.shares_D)] for name, q in fitted.quantiles.items()}
    vocabularies = {name: (v.code_V.tolist(), v.count_V.tolist()) for name, v in fitted.vocabularies.items()}
    return {name: (m.mean_D.tobytes(), m.deviation_D.tobytes()) for name, m in fitted.moments.items()}, quantiles, vocabularies


def numbers(rows, column):
    """float64 [N, D], NaN for null."""
    return np.array([np.nan if row[column] is None else row[column] for row in rows], np.float64).reshape(len(rows), -1)


def code(value):
    return int(string_codes(pa.array([value])).view(np.int64)[0]) if isinstance(value, str) else value


def naive_vocabulary(values, table):
    counts = Counter(map(code, values))
    enough = [value for value in counts if counts[value] >= table.min_count]
    return sorted(enough, key=lambda value: (-counts[value], value))[: table.rows - 1], counts


class TestEqualToOneLook:
    @some_examples
    @given(logs, st.integers(1, 5), st.integers(1, 4))
    def test_ranks_change_nothing_and_slices_only_the_rounding_of_moments(self, tmp_path_factory, rows, row_group_rows, slice_rows):
        listing = write(tmp_path_factory.mktemp("log"), rows, row_group_rows)
        whole = fit(listing)
        for parts in (listing, cut(listing, slice_rows)):
            alone = fit(parts)
            assert parts_of(alone)[1:] == parts_of(whole)[1:]
            for name, moments in whole.moments.items():
                np.testing.assert_allclose(alone.moments[name].mean_D, moments.mean_D, rtol=1e-12, atol=1e-9)
                np.testing.assert_allclose(alone.moments[name].deviation_D, moments.deviation_D, rtol=1e-12, atol=1e-9)
            for world_size in (2, 3, 7):
                assert parts_of(fit(parts, world_size)) == parts_of(alone)

    @some_examples
    @given(logs, st.integers(1, 5))
    def test_moments_and_quantiles_are_those_of_numpy(self, tmp_path_factory, rows, row_group_rows):
        fitted = fit(write(tmp_path_factory.mktemp("log"), rows, row_group_rows), world_size=2)
        for column in ("price", "vector"):
            number_ND = numbers(rows, column)
            np.testing.assert_allclose(fitted.moments[column].mean_D, np.nanmean(number_ND, 0), rtol=1e-12, atol=1e-9)
            np.testing.assert_allclose(fitted.moments[column].deviation_D, np.nanstd(number_ND, 0), rtol=1e-9, atol=1e-6)
            for d, known_N in enumerate(column_N[~np.isnan(column_N)] for column_N in number_ND.T):
                quantile_Q, share_Q = np.quantile(known_N, np.linspace(0, 1, NUM_QUANTILES)), np.linspace(0, 1, NUM_QUANTILES)
                values = sorted(set(quantile_Q.tolist()))
                quantiles = fitted.quantiles[f"{column}_share"]
                assert quantiles.values_D[d].tolist() == values
                expected = [share_Q[quantile_Q == value].mean() for value in values]
                np.testing.assert_allclose(quantiles.shares_D[d], expected, rtol=0, atol=1e-12)

    @some_examples
    @given(logs, st.integers(1, 5))
    def test_vocabularies_are_counted_and_cut_as_a_counter_would(self, tmp_path_factory, rows, row_group_rows):
        fitted = fit(write(tmp_path_factory.mktemp("log"), rows, row_group_rows), world_size=2)
        pages = ["home" if row["page"] is None else row["page"] for row in rows]
        found = {
            "word": [*pages, *(tag for row in rows for tag in row["tags"])],
            "item": [*(row["item"] for row in rows), *(item for row in rows for item in row["seen"] or [])],
        }
        for table in TABLES:
            codes, counts = naive_vocabulary(found[table.name], table)
            vocabulary = fitted.vocabularies[table.name]
            assert vocabulary.code_V.tolist() == codes and vocabulary.count_V.tolist() == [counts[value] for value in codes]
            asked = [*counts, 10**9]
            expected = [codes.index(value) + 1 if value in codes else 0 for value in asked]
            assert vocabulary.rows_of(np.array(asked, np.int64)).tolist() == expected


class TestQuantilesOfMany:
    def test_a_sample_of_them_is_near_all_and_the_same_for_any_slices_and_ranks(self, tmp_path):
        price_N = np.random.default_rng(0).lognormal(size=250_000)
        schema = Schema(SCHEMA.data, TABLES[1:], (FEATURES[1], FEATURES[6]), SCHEMA.labels)
        path = str(tmp_path / "f.parquet")
        pq.write_table(pa.table({"price": price_N, "item": [0] * len(price_N), "click": [0] * len(price_N)}), path, 100_000)
        listing = list_slices(schema, [path], labels=True)
        fitted = fit(listing, schema=schema)
        assert parts_of(fit(cut(listing, 33_333), 3, schema)) == parts_of(fitted)
        share_N = fitted.quantiles["price_share"].apply(price_N[:, None])[:, 0]
        true_share_N = np.argsort(np.argsort(price_N)) / len(price_N)
        assert np.abs(share_N - true_share_N).max() < 0.006
        assert (share_N.min(), share_N.max()) >= (0, 0.99) and share_N.max() <= 1


class TestApplied:
    ROWS = (
        {"price": 1.0, "vector": [1.0, 5.0], "page": "a", "tags": ["b", "a"], "item": 3, "seen": [2], "click": 0},
        {"price": 3.0, "vector": [3.0, 5.0], "page": "b", "tags": ["b"], "item": 3, "seen": [], "click": 0},
        {"price": None, "vector": [5.0, 5.0], "page": None, "tags": ["once"], "item": 2, "seen": [1, 9], "click": 0},
    )

    def decoded(self, folder, rows, fitted):
        decoder = Decoder(SCHEMA, fitted)
        ((part, table),) = read_slices(SCHEMA, write(folder, rows, 10).slices, decoder.columns)
        return decoder.decode(table, str(part), 0)[0]

    def test_what_the_model_reads(self, tmp_path):
        rows = self.decoded(tmp_path, self.ROWS, fit(write(tmp_path, self.ROWS, 2)))
        # price: mean 2, deviation 1, default 1; vector: mean 3, deviation sqrt(8 / 3), then halved; a constant dimension becomes 0.
        third = 1 / np.sqrt(8 / 3)
        expected = [[-1, 0, -third, 0, 0, 0.5], [1, 1, 0, 0, 0.5, 0.5], [-1, 0, third, 0, 1, 0.5]]
        np.testing.assert_allclose(rows.dense_ND, expected, rtol=1e-6, atol=1e-7)
        # b occurs 3 times, a twice, home, which is the default, and "once" once. 2 and 3 twice, 1 and 9 once; equal counts go by value.
        ids = {name: rows.ids_F[i] for i, name in enumerate(SCHEMA.id_feature_names)}
        assert ids["page"].value_M.tolist() == [2, 1, 0]
        assert as_lists(ids["tags"]) == [[1, 2], [1], [0]]
        assert ids["item"].value_M.tolist() == [2, 2, 1]
        assert as_lists(ids["seen"]) == [[1], [], [4]]

    def test_values_that_training_did_not_see(self, tmp_path):
        fitted = fit(write(tmp_path, self.ROWS, 2))
        other = self.ROWS[0] | {"price": 1e6, "vector": [-9.0, 7.0], "page": "new", "tags": ["a", "new"], "item": 17}
        rows = self.decoded(tmp_path, [other], fitted)
        assert [rows.ids_F[i].value_M.tolist() for i in (0, 1, 2)] == [[0], [0], [2, 0]]
        np.testing.assert_allclose(rows.dense_ND[0, [0, 1, 4, 5]], [1e6 - 2, 1, 0, 1], rtol=1e-6)

    def test_a_table_of_one_row_is_for_everything(self, tmp_path):
        schema = replace(SCHEMA, tables=(TABLES[0], TableIds(name="item", rows=1, ids="vocabulary")))
        vocabulary = fit(write(tmp_path, self.ROWS, 2), schema=schema).vocabularies["item"]
        assert vocabulary.rows_of(np.array([3, 2, 7])).tolist() == [0, 0, 0]

    def test_nothing_to_fit(self, tmp_path):
        plain = Schema(SCHEMA.data, (TableIds(name="item", rows=6),), (FEATURES[6],), SCHEMA.labels)
        assert needs_fitting(SCHEMA) and not needs_fitting(plain)
        assert parts_of(fit(write(tmp_path, self.ROWS, 2), schema=plain)) == ({}, {}, {})


class TestRefusals:
    def refusal(self, tmp_path, rows=TestApplied.ROWS, world_size=1, **data):
        listing = write(tmp_path, rows, 1)
        with pytest.raises(InputError) as refused:
            fit(listing, world_size, replace(SCHEMA, data=SCHEMA.data.model_copy(update=data)))
        assert "\n" not in str(refused.value)
        return str(refused.value).removeprefix(f"{tmp_path}/")

    def test_infinity_is_named_or_its_slice_left_out_as_in_training(self, tmp_path):
        rows = [*TestApplied.ROWS, TestApplied.ROWS[0] | {"price": np.inf, "item": 77}]
        assert self.refusal(tmp_path, rows) == "f.parquet: row group 3: column 'price' (feature 'price') holds infinity"
        skipping = replace(SCHEMA, data=SCHEMA.data.model_copy(update={"on_bad_file": "skip"}))
        assert parts_of(fit(write(tmp_path, rows, 1), 2, skipping)) == parts_of(fit(write(tmp_path, TestApplied.ROWS, 1)))

    def test_where_no_slice_can_be_read_it_says_so(self, tmp_path):
        rows = [row | {"price": -np.inf} for row in TestApplied.ROWS]
        assert self.refusal(tmp_path, rows, on_bad_file="skip") == "feature 'price': no readable rows to fit its transform to"

    def test_quantiles_of_nothing(self, tmp_path):
        rows = [row | {"price": None} for row in TestApplied.ROWS]
        assert self.refusal(tmp_path, rows) == "feature 'price_share': column 'price' holds no number to take quantiles of"

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_a_vocabulary_of_integers_and_strings(self, tmp_path, world_size):
        schema = replace(
            SCHEMA, features=tuple(f.model_copy(update={"table": "word"}) if f.is_id else f for f in FEATURES), tables=TABLES[:1]
        )
        with pytest.raises(InputError, match=r"row group 0: column 'item' .* holds integers, but other .* table 'word' hold strings"):
            fit(write(tmp_path, TestApplied.ROWS, 1), world_size, schema)

    def test_integers_on_one_rank_and_strings_on_another(self, tmp_path):
        tables, features = (TABLES[0],), (FEATURES[4],)
        schema = Schema(SCHEMA.data, tables, features, SCHEMA.labels)
        parts = []
        for name, values in (("a", ["x"]), ("b", [1])):
            pq.write_table(pa.table({"page": values, "click": [0]}), tmp_path / name)
            parts.append(gather(schema, list_slices(schema, [f"{tmp_path}/{name}"], labels=True)))
        with pytest.raises(InputError, match="table 'word': its columns hold integers in some files and strings in others"):
            joined(schema, Listing(), parts)


def test_an_unfitted_run_transforms_by_its_recipe_alone():
    feature = Feature(name="price", kind="dense", transform="log1p")
    np.testing.assert_allclose(Fitted().transformed(np.array([[0.0], [1.0]]), feature), [[0], [np.log(2)]])
