"""What --data and a recipe's keys name, what is checked before training, and groups and scenarios of any type."""

from datetime import date, datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small import rows, write_log
from triptych.datasets.files import list_row_groups
from triptych.datasets.parquet import check_columns
from triptych.datasets.schema import InputError
from triptych.launch.config import load_recipe
from triptych.launch.inference import Split, check_data, entity_loader, evaluate_rows, given_files, group_codes, split_files


def rank(number, world_size):
    return SimpleNamespace(rank=number, world_size=world_size)


def refusal(function, *args, **keys):
    with pytest.raises(InputError) as refused:
        function(*args, **keys)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write(path, columns, row_group_rows=None):
    """A file of the columns that are not `...`."""
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not ...}), path, row_group_rows)
    return str(path)


class TestWhichFiles:
    @pytest.fixture
    def schema(self, tmp_path, monkeypatch):
        """A valid.parquet in the working directory and one in the root, and files that only one of them has."""
        recipe = load_recipe(write_log(tmp_path / "root"), [])
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        for name in ("valid.parquet", "only_here.parquet"):
            write(name, rows(50))
        return recipe.data_schema

    def test_a_recipes_key_is_relative_to_the_root_alone(self, schema, tmp_path):
        assert split_files(schema, "valid.parquet") == [f"{tmp_path}/root/valid.parquet"]
        assert split_files(schema, "val*.parquet") == [f"{tmp_path}/root/valid.parquet"]
        assert split_files(schema, f"{tmp_path}/here/only_here.parquet") == [f"{tmp_path}/here/only_here.parquet"]
        assert refusal(split_files, schema, "only_here.parquet").startswith(f"no such file: {tmp_path}/root/only_here.parquet")

    def test_given_data_is_relative_to_the_working_directory_or_else_to_the_root(self, schema, tmp_path):
        assert given_files(schema, "valid.parquet") == ["valid.parquet"]
        assert given_files(schema, "*.parquet") == ["only_here.parquet", "valid.parquet"]
        assert given_files(schema, "tr*.parquet") == [f"{tmp_path}/root/train.parquet"]
        assert given_files(schema, f"{tmp_path}/root/v*.parquet") == [f"{tmp_path}/root/valid.parquet"]
        assert refusal(given_files, schema, "nowhere.parquet").startswith(f"no such file: {tmp_path}/root/nowhere.parquet")

    def test_a_split_takes_a_recipes_key_or_files(self, schema, tmp_path):
        key, files = (Split("valid", schema, [], data, rank(0, 1)) for data in ("valid.parquet", ["valid.parquet"]))
        assert {group.path for group in key.groups} == {f"{tmp_path}/root/valid.parquet"}
        assert {group.path for group in files.groups} == {"valid.parquet"}


def test_every_rank_reads_row_groups_of_its_own(tmp_path, monkeypatch):
    recipe = load_recipe(write_log(tmp_path, train_rows=600, row_group_rows=100), ["data.batch_size=20"])
    groups = list_row_groups([f"{tmp_path}/train.parquet"])
    read, row_numbers = [], []
    for number in range(2):
        loader = entity_loader(recipe.data_schema, groups, rank(number, 2))
        decode, decoded = loader._decode, []
        monkeypatch.setattr(loader, "_decode", lambda group, decode=decode, decoded=decoded: decoded.append(group) or decode(group))
        row_numbers += [row for batch in loader.batches() for row in batch.row_B.tolist()]
        read += decoded
    assert sorted(read) == groups
    assert sorted(row_numbers) == list(range(600))


class TestColumnsOfMetrics:
    """Columns that [data] names and no feature reads."""

    GOOD = rows(6) | {"day": pa.array(range(6), pa.date32())}

    def check(self, tmp_path, key, column, values):
        recipe = load_recipe(write_log(tmp_path, train_rows=10, valid_rows=10), [f"data.{key}={column}"])
        check_columns(recipe.data_schema, write(tmp_path / "f.parquet", self.GOOD | {column: values}), labels=True)

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            *(("group", pa.array(range(6), kind)) for kind in (pa.uint64(), pa.int8(), pa.date32(), pa.timestamp("ns", "UTC"))),
            *(("group", pa.array(values)) for values in ([True] * 6, ["a"] * 6)),
            *(("scenario", pa.array([value] * 6)) for value in (1, "a", 0.5, True)),
            *((key, pa.array(["a"] * 6).dictionary_encode()) for key in ("group", "scenario")),
            *(("time", pa.array(range(6), kind)) for kind in (pa.int64(), pa.float32(), pa.date64(), pa.timestamp("ms"))),
        ],
    )
    def test_types_that_fit(self, tmp_path, key, values):
        self.check(tmp_path, key, "extra", values)

    @pytest.mark.parametrize(
        ("key", "values", "message"),
        [
            *(("group", [v] * 6, "needs integers, strings, booleans, dates or timestamps") for v in (0.5, [1], {"a": 1}, None)),
            *(("scenario", [v] * 6, "needs one value a row") for v in ([1], {"a": 1})),
            *(("time", [v] * 6, "needs numbers, dates or timestamps") for v in ("2020-01-01", [1], True)),
        ],
    )
    def test_types_that_do_not_fit(self, tmp_path, key, values, message):
        refused = refusal(self.check, tmp_path, key, "extra", pa.array(values))
        kind = pq.read_schema(tmp_path / "f.parquet").field("extra").type
        assert refused == f"{tmp_path}/f.parquet: column 'extra' is {kind}, but data.{key} {message}"

    @pytest.mark.parametrize("key", ["group", "scenario", "time", "weight"])
    def test_a_column_that_is_not_there(self, tmp_path, key):
        message = f"{tmp_path}/f.parquet: no column 'dya' for data.{key} (did you mean 'day'?)"
        assert refusal(self.check, tmp_path, key, "dya", ...) == message

    @pytest.mark.parametrize(
        ("column", "asked_by"), [("length", "feature 'length'"), ("buy", "task 'cvr'"), ("time_ms", "data.time"), ("day", None)]
    )
    def test_two_columns_of_one_name(self, tmp_path, column, asked_by):
        recipe = load_recipe(write_log(tmp_path, train_rows=10, valid_rows=10), ["data.time=time_ms"])
        table, path = pa.table(self.GOOD), f"{tmp_path}/f.parquet"
        pq.write_table(table.append_column(column, table.column(column)), path)
        if asked_by is None:
            check_columns(recipe.data_schema, path, labels=True)
        else:
            message = refusal(check_columns, recipe.data_schema, path, labels=True)
            assert message == f"{path}: 2 columns are named '{column}', which {asked_by} reads"


class TestGroupCodes:
    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            ([0, 2**63, 2**63 + 1, 2**64 - 1, 5], pa.uint64()),
            ([-1, 0, 7, -(2**31)], pa.int32()),
            ([True, False], pa.bool_()),
            ([date(2020, 1, 1), date(1969, 12, 31), date(9999, 12, 31)], pa.date32()),
            ([datetime(2020, 1, 1, 0, 0, 0, 1), datetime(2020, 1, 1)], pa.timestamp("us")),
            ([datetime(2020, 1, 1, 0, 0, 1), datetime(2020, 1, 1)], pa.timestamp("ns", "Europe/Berlin")),
            (["", "a", "b"], pa.string()),
        ],
    )
    def test_values_and_nulls_are_equal_where_their_codes_are(self, values, kind):
        codes = group_codes(pa.array([*values, None, *values, None], kind))
        assert codes.dtype == np.int64
        assert len(set(codes[: len(values) + 1])) == len(values) + 1
        assert codes[: len(values) + 1].tolist() == codes[len(values) + 1 :].tolist()

    @pytest.mark.parametrize(
        "kinds",
        [
            (pa.int8(), pa.uint16(), pa.int64(), pa.uint64()),
            (pa.string(), pa.large_string()),
            (pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("ns")),
        ],
    )
    def test_equal_values_of_columns_of_other_widths(self, kinds):
        values = {pa.int8(): [3, 7], pa.string(): ["a", "b"], pa.date32(): [date(2020, 1, 1), date(2021, 1, 1)]}[kinds[0]]
        assert len({tuple(group_codes(pa.array(values, kinds[0]).cast(kind))) for kind in kinds}) == 1


@pytest.mark.parametrize(
    ("group_kinds", "page_kinds"),
    [
        ((pa.int32(), pa.int64()), (pa.string(), pa.dictionary(pa.int32(), pa.string()))),
        ((pa.dictionary(pa.int8(), pa.string()), pa.large_string()), (pa.large_string(), pa.string())),
    ],
)
def test_files_whose_groups_and_scenarios_differ_in_type_are_evaluated_as_one(tmp_path, group_kinds, page_kinds):
    recipe = load_recipe(write_log(tmp_path), ["data.group=who"])
    columns = rows(300) | {"who": np.arange(300) % 7}
    prediction_NT = np.random.default_rng(0).uniform(0.1, 0.9, (300, 3))
    parts, plain = [], group_kinds[1]
    for part, (group_kind, page_kind) in enumerate(zip(group_kinds, page_kinds, strict=True)):
        columns_of_part = {name: values[part * 100 : 100 + part * 200] for name, values in columns.items()}
        who = pa.array(columns_of_part["who"]).cast(plain if pa.types.is_integer(plain) else pa.string()).cast(group_kind)
        page = pa.array(columns_of_part["page"]).cast(page_kind)
        parts.append(write(tmp_path / f"{part}.parquet", columns_of_part | {"who": who, "page": page}, 60))
    whole = [write(tmp_path / "whole.parquet", columns | {"who": pa.array(columns["who"]).cast(plain)})]
    of_parts, of_whole = (
        evaluate_rows(prediction_NT, list_row_groups(files), recipe.data_schema, recipe.tasks) for files in (parts, whole)
    )
    assert of_parts == of_whole
    assert of_whole["tasks"]["ctr"]["gauc"] is not None and set(of_whole["scenarios"]) == {"home", "search", "feed"}


class TestChecksBeforeTraining:
    def check(self, tmp_path, **changes):
        """Check a run whose valid.parquet or items.parquet has one wrong value, in row group 1."""
        path = write_log(tmp_path)
        for name, (column, value) in changes.items():
            columns = rows(20)
            columns[column] = [*columns[column].tolist()[:-1], value]
            write(tmp_path / f"{name}.parquet", columns, 10)
        check_data(load_recipe(path, ["data.items=items.parquet"] if "items" in changes else []))

    def test_good_files(self, tmp_path):
        self.check(tmp_path, valid=("click", 1), items=("item", 59))

    def test_a_null_label_in_valid(self, tmp_path):
        message = f"{tmp_path}/valid.parquet: row group 1: label 'click' of task 'ctr' has 1 nulls; drop those rows"
        assert refusal(self.check, tmp_path, valid=("click", None)) == message

    def test_a_null_id_in_the_catalogue(self, tmp_path):
        message = f"{tmp_path}/items.parquet: row group 1: column 'item' has 1 nulls; every item of the catalogue needs an id"
        assert refusal(self.check, tmp_path, items=("item", None)) == message
