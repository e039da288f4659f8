"""Every column a recipe reads is there once, with a type that fits and that all files of the run agree on."""

from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_decode import GOOD, SCHEMA, schema
from triptych.datasets.parquet.layout import ColumnTypes, agree, check_columns, family
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds


def refusal(function, *args, **keys):
    with pytest.raises(InputError) as refused:
        function(*args, **keys)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def check(changes, schema=SCHEMA, **keys):
    """Check the columns of GOOD with some replaced, or dropped where the replacement is `...`."""
    columns = {name: values for name, values in (GOOD | changes).items() if values is not ...}
    return check_columns(schema, "f.parquet", pa.table(columns).schema, **({"labels": True} | keys))


class TestWrongColumns:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"page": [[1]] * 4}, "'page' is list<item: int64>, but feature 'page' of kind 'id' needs integers or strings"),
            ({"page": pa.array(range(4), pa.date32())}, "'page' is date32[day], but feature 'page' of kind 'id' needs integers or strings"),
            ({"user": pa.nulls(4)}, "'user' is null, but feature 'user' of kind 'id' needs integers or strings"),
            ({"age": ["old"] * 4}, "'age' is string, but feature 'band' of kind 'id' needs numbers"),
            ({"seen": [1] * 4}, "'seen' is int64, but feature 'seen' of kind 'ids' needs lists of integers or strings"),
            (
                {"seen": pa.array([[1]] * 4, pa.list_view(pa.int64()))},
                "'seen' is list_view<item: int64>, but feature 'seen' of kind 'ids' needs lists of integers or strings",
            ),
            ({"price": ["1"] * 4}, "'price' is string, but feature 'price' of kind 'dense' needs numbers"),
            ({"price": pa.nulls(4)}, "'price' is null, but feature 'price' of kind 'dense' needs numbers"),
            ({"vector": [1.0] * 4}, "'vector' is double, but feature 'vector' of kind 'vector' needs lists of numbers"),
            ({"vector": [["1"]] * 4}, "'vector' is list<item: string>, but feature 'vector' of kind 'vector' needs lists of numbers"),
            ({"click": ["1"] * 4}, "'click' is string, but task 'ctr' needs numbers"),
            ({"dwell_ms": pa.array(range(4), pa.duration("ms"))}, "'dwell_ms' is duration[ms], but task 'dwell' needs numbers"),
            ({"w": ["1"] * 4}, "'w' is string, but data.weight needs numbers"),
        ],
    )
    def test_a_type_that_does_not_fit(self, changes, message):
        assert refusal(check, changes) == f"f.parquet: column {message}"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"price": ..., "prices": [0] * 4}, "'price' for feature 'price' (did you mean 'prices'?)"),
            ({"age": ...}, "'age' for feature 'band' (did you mean 'page'?)"),
            ({"dwell_ms": ..., "dwel_ms": [0] * 4}, "'dwell_ms' for task 'dwell' (did you mean 'dwel_ms'?)"),
            ({"w": ...}, "'w' for data.weight"),
        ],
    )
    def test_a_column_that_is_not_there(self, changes, message):
        assert refusal(check, changes) == f"f.parquet: no column {message}"

    def test_labels_and_skipped_features_need_not_be_there(self):
        absent = dict.fromkeys(("click", "buy", "dwell_ms", "w", "user"), ...)
        assert check(absent, labels=False, skip_features=["user"]).keys() == GOOD.keys() - absent.keys()
        with pytest.raises(InputError, match="no column 'user' for feature 'user'"):
            check(absent, labels=False)

    def test_a_column_of_nulls_fits_where_a_default_stands_for_them(self):
        assert check({"user": pa.nulls(4)}, schema(user={"default": 5}))["user"] == "nothing"


class TestColumnsOfMetrics:
    """Columns that [data] names and no feature reads."""

    GOOD: ClassVar = {"user": [1] * 6, "click": [0] * 6, "length": [1.0] * 6, "day": pa.array(range(6), pa.date32())}

    def check(self, key, column, *tables):
        data = DataSection(root=".", **{key: column})
        features = (Feature(name="user", kind="id", table="t"), Feature(name="length", kind="dense"))
        metrics = Schema(data, (TableIds(name="t", rows=9),), features, (Label(name="ctr", kind="binary", label="click"),))
        for table in tables:
            check_columns(metrics, "f.parquet", table.schema, labels=True)

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            *(("group", pa.array(range(6), kind)) for kind in (pa.uint64(), pa.int8(), pa.date32(), pa.timestamp("ns", "UTC"))),
            *(("group", pa.array(values)) for values in ([True] * 6, ["a"] * 6)),
            *(("scenario", pa.array([value] * 6)) for value in (1, "a", 0.5, True)),
            *((key, pa.array(["a"] * 6).dictionary_encode()) for key in ("group", "scenario")),
            *((key, pa.array(["a"] * 6, pa.string_view())) for key in ("group", "scenario")),
            *(("time", pa.array(range(6), kind)) for kind in (pa.int64(), pa.float32(), pa.date64(), pa.timestamp("ms"))),
        ],
    )
    def test_types_that_fit(self, key, values):
        self.check(key, "extra", pa.table(self.GOOD | {"extra": values}))

    @pytest.mark.parametrize(
        ("key", "values", "message"),
        [
            *(("group", [v] * 6, "needs integers, strings, booleans, dates or timestamps") for v in (0.5, [1], {"a": 1}, None)),
            *(("scenario", [v] * 6, "needs one value a row") for v in ([1], {"a": 1})),
            *(("time", [v] * 6, "needs numbers, dates or timestamps") for v in ("2020-01-01", [1], True)),
        ],
    )
    def test_types_that_do_not_fit(self, key, values, message):
        table = pa.table(self.GOOD | {"extra": values})
        refused = refusal(self.check, key, "extra", table)
        assert refused == f"f.parquet: column 'extra' is {table.schema.field('extra').type}, but data.{key} {message}"

    @pytest.mark.parametrize("key", ["group", "scenario", "time", "weight"])
    def test_a_column_that_is_not_there(self, key):
        message = f"f.parquet: no column 'dya' for data.{key} (did you mean 'day'?)"
        assert refusal(self.check, key, "dya", pa.table(self.GOOD)) == message

    @pytest.mark.parametrize(
        ("column", "asked_by"), [("length", "feature 'length'"), ("click", "task 'ctr'"), ("day", "data.time"), ("spare", None)]
    )
    def test_two_columns_of_one_name(self, column, asked_by):
        table = pa.table(self.GOOD | {"spare": [0] * 6})
        table = table.append_column(column, table.column(column))
        if asked_by is None:
            self.check("time", "day", table)
        else:
            message = refusal(self.check, "time", "day", table)
            assert message == f"f.parquet: 2 columns are named '{column}', which {asked_by} reads"


WIDTHS = {
    "integers": [pa.int8(), pa.uint64(), pa.dictionary(pa.int8(), pa.int32())],
    "floats": [pa.float16(), pa.float64()],
    "booleans": [pa.bool_()],
    "strings": [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.large_string())],
    "moments": [pa.date32(), pa.timestamp("ns", "UTC")],
    "nothing": [pa.null()],
    "lists of integers": [pa.list_(pa.int8()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 3)],
    "lists of strings": [pa.list_(pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))],
    "lists of nothing": [pa.list_(pa.null())],
}
families = st.sampled_from(list(WIDTHS))


class TestDrift:
    @pytest.mark.parametrize("name", WIDTHS)
    def test_types_that_hold_the_same_values_are_one_family(self, name):
        assert {family(kind) for kind in WIDTHS[name]} == {name}

    @given(families, families)
    def test_families_agree_with_themselves_and_with_nothing(self, one, other):
        both_lists = one.startswith("lists") and other.startswith("lists")
        expected = one == other or "nothing" in (one, other) or (both_lists and "lists of nothing" in (one, other))
        assert agree(one, other) == agree(other, one) == expected

    @settings(deadline=None, max_examples=60)
    @given(st.lists(families, min_size=1, max_size=5))
    def test_one_file_after_another_is_refused_where_it_differs_from_the_first_that_said_something(self, found):
        types, known, first = ColumnTypes(), "nothing", 0
        for number, its_family in enumerate(found):
            if not agree(known, its_family):
                message = refusal(types.add, f"{number}.parquet", {"c": its_family})
                assert message.startswith(f"{number}.parquet: column 'c' holds {its_family}, but {known} in {first}.parquet; ")
                break
            types.add(f"{number}.parquet", {"c": its_family})
            if known.endswith("nothing") and its_family not in ("nothing", known):
                known, first = its_family, number
            assert types.families["c"][0] == known

    def test_a_copy_is_its_own(self):
        types = ColumnTypes()
        types.add("a", {"c": "nothing"})
        types.copy().add("b", {"c": "integers"})
        types.add("c", {"c": "strings"})
        assert types.families == {"c": ("strings", "c")}

    def test_a_refused_file_leaves_no_trace(self):
        types = ColumnTypes()
        types.add("a", {"c": "nothing", "d": "integers"})
        assert refusal(types.add, "b", {"c": "strings", "d": "strings"}).startswith("b: column 'd' holds strings, but integers in a; ")
        types.add("c", {"c": "integers", "d": "integers"})

    def test_files_of_a_split_and_of_the_run_are_compared(self, tmp_path):
        paths = []
        for number, user in enumerate((pa.array(GOOD["user"], pa.int8()), pa.array(GOOD["user"]), pa.array(["7", "8", "7", "9"]))):
            paths.append(str(tmp_path / f"{number}.parquet"))
            pq.write_table(pa.table(GOOD | {"user": user}), paths[-1])
        types = list_slices(SCHEMA, paths[:2], labels=True).types
        differs = f"{paths[2]}: column 'user' holds strings, but integers in {paths[0]}; write both with one type"
        assert refusal(list_slices, SCHEMA, paths, labels=True).startswith(differs)
        assert refusal(list_slices, SCHEMA, paths[2:], labels=True, types=types).startswith(differs)
        others = [feature.name for feature in SCHEMA.features if feature.column == "user"]
        list_slices(SCHEMA, paths[2:], labels=True, types=types, skip_features=others)
