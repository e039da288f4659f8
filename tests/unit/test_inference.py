"""What --data and a recipe's keys name, what is checked before training, and groups and scenarios of any type."""

from datetime import date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.small import rows, write_log
from tests.unit.test_loader_threads import recording
from triptych.datasets.fitted import Fitted
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import InputError
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.inference import Predictions, Split, check_data, entity_loader, evaluate_rows, given_files, group_codes, split_files


def rank(number, world_size):
    return Ranks(number, world_size, 0, 1, torch.device("cpu"))


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
        key, files = (Split("valid", schema, [], data, rank(0, 1), Fitted()) for data in ("valid.parquet", ["valid.parquet"]))
        assert {part.file.path for part in key.slices} == {f"{tmp_path}/root/valid.parquet"}
        assert {part.file.path for part in files.slices} == {"valid.parquet"}


def test_every_rank_reads_row_groups_of_its_own(tmp_path):
    schema = load_recipe(write_log(tmp_path, train_rows=600, row_group_rows=100), ["data.batch_size=20"]).data_schema
    slices = list_slices(schema, [f"{tmp_path}/train.parquet"], labels=True).slices
    read, row_numbers = [], []
    for number in range(2):
        loader = entity_loader(recording(read.append)(schema, Fitted()), slices, rank(number, 2))
        row_numbers += [row for batch in loader.batches() for row in batch.row_B.tolist()]
    assert sorted(read) == sorted(map(str, slices))
    assert sorted(row_numbers) == list(range(600))


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
        ((pa.string_view(), pa.string()), (pa.string_view(), pa.string())),
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
        evaluate_rows(all_read(prediction_NT), list_slices(recipe.data_schema, files, labels=True).slices, recipe.data_schema, recipe.tasks)
        for files in (parts, whole)
    )
    assert of_parts == of_whole
    assert of_whole["tasks"]["ctr"]["gauc"] is not None and set(of_whole["scenarios"]) == {"home", "search", "feed"}


def all_read(prediction_NT):
    return Predictions(prediction_NT, np.ones(len(prediction_NT), bool))


class TestRowsThatDoNotCount:
    def evaluated(self, tmp_path, columns, predictions, *overrides):
        recipe = load_recipe(tmp_path / "recipe.toml", ["data.scenario=page", *overrides])
        slices = list_slices(recipe.data_schema, [write(tmp_path / "f.parquet", columns, 50)], labels=True).slices
        return evaluate_rows(predictions, slices, recipe.data_schema, recipe.tasks)

    def test_masked_labels_are_those_of_a_split_without_their_rows(self, tmp_path):
        write_log(tmp_path)
        columns, prediction_NT = rows(200), np.random.default_rng(0).uniform(0.1, 0.9, (200, 3))
        null_N = np.random.default_rng(1).random(200) < 0.2
        masked = columns | {"click": pa.array(columns["click"], mask=null_N)}
        found = self.evaluated(tmp_path, masked, all_read(prediction_NT), "tasks.ctr.nulls=mask")
        kept = {name: np.asarray(values, object)[~null_N].tolist() for name, values in columns.items()}
        expected = self.evaluated(tmp_path, kept, all_read(prediction_NT[~null_N]))
        assert found["tasks"] == expected["tasks"] and (found["rows"], expected["rows"]) == (200, 200 - null_N.sum())

    def test_rows_that_were_not_read_are_left_out_where_bad_files_are_skipped(self, tmp_path):
        write_log(tmp_path)
        columns, prediction_NT = rows(200), np.random.default_rng(0).uniform(0.1, 0.9, (200, 3))
        left = np.ones(200, bool)
        left[50:100] = left[120] = False
        prediction_NT[~left] = np.nan
        found = self.evaluated(tmp_path, columns, Predictions(prediction_NT, left), "data.on_bad_file=skip")
        kept = {name: np.asarray(values, object)[left].tolist() for name, values in columns.items()}
        assert found == self.evaluated(tmp_path, kept, all_read(prediction_NT[left])) and found["rows"] == 149
        nothing = Predictions(prediction_NT, np.zeros(200, bool))
        assert refusal(self.evaluated, tmp_path, columns, nothing, "data.on_bad_file=skip") == "no row of the split could be read"


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
        message = (
            f"{tmp_path}/valid.parquet: row group 1: label 'click' of task 'ctr' has 1 nulls; drop those rows, or set its nulls = \"mask\""
        )
        assert refusal(self.check, tmp_path, valid=("click", None)) == message

    def test_a_null_label_that_its_task_masks_is_no_reason(self, tmp_path):
        path = write_log(tmp_path)
        columns = rows(20)
        write(tmp_path / "valid.parquet", columns | {"click": [*columns["click"].tolist()[:-1], None]})
        check_data(load_recipe(path, ["tasks.ctr.nulls=mask"]))

    def test_a_column_that_valid_or_the_catalogue_holds_as_another_type(self, tmp_path):
        path = write_log(tmp_path)
        write(tmp_path / "items.parquet", rows(20) | {"item": [str(item) for item in rows(20)["item"]]})
        differs = f"{tmp_path}/items.parquet: column 'item' holds strings, but integers in {tmp_path}/train.parquet; "
        assert refusal(check_data, load_recipe(path, ["data.items=items.parquet"])).startswith(differs)
        write(tmp_path / "valid.parquet", rows(20) | {"page": list(range(20))})
        differs = f"{tmp_path}/valid.parquet: column 'page' holds integers, but strings in {tmp_path}/train.parquet; "
        assert refusal(check_data, load_recipe(path)).startswith(differs)

    def test_what_is_skipped_is_not_refused(self, tmp_path):
        self.check(tmp_path, valid=("click", 1))
        (tmp_path / "train").mkdir()
        for name in ("a", "b"):
            write(tmp_path / "train" / f"{name}.parquet", rows(20))
        (tmp_path / "train" / "a.parquet").write_bytes(b"")
        recipe = tmp_path / "recipe.toml"
        assert refusal(check_data, load_recipe(recipe, ["data.train=train"])).startswith(f"{tmp_path}/train/a.parquet: not a readable")
        check_data(load_recipe(recipe, ["data.train=train", "data.on_bad_file=skip"]))

    def test_a_null_id_in_the_catalogue(self, tmp_path):
        message = f"{tmp_path}/items.parquet: row group 1: column 'item' has 1 nulls; every item of the catalogue needs an id"
        assert refusal(self.check, tmp_path, items=("item", None)) == message
