"""What is skipped in one place is skipped in all: fitting, types, the cut of row groups, entities; and a constant stays one."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small import rows, write_log
from triptych.datasets.entities import write_entities
from triptych.datasets.fitted import Fitted
from triptych.datasets.fitting import gather, joined
from triptych.datasets.ids import keyed_codes
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import ReadingPosition
from triptych.datasets.schema import InputError
from triptych.launch.config import load_recipe
from triptych.launch.inference import check_data

GROUP_ROWS = 50


def recipe_of(folder, *overrides):
    return load_recipe(write_log(folder), ["data.on_bad_file=skip", "features.length.transform=standard", *overrides])


def write(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, GROUP_ROWS)
    return str(path)


def fitted_to(schema, path):
    listing = list_slices(schema, [path], labels=True)
    return joined(schema, listing, [gather(schema, listing)])


@pytest.mark.parametrize("spoiled", [("length", 1e39), ("length", float("nan")), ("click", 7)])
def test_statistics_are_of_the_rows_that_are_trained(tmp_path, spoiled):
    schema = recipe_of(tmp_path).data_schema
    columns = rows(3 * GROUP_ROWS)
    columns["length"] = columns["length"].astype(np.float64)
    columns["length"][:GROUP_ROWS] = 1e6
    column, value = spoiled
    columns[column] = np.asarray(columns[column], np.float64)
    columns[column][3] = value
    moments = fitted_to(schema, write(tmp_path / "f.parquet", columns)).moments["length"]
    kept = columns["length"][GROUP_ROWS:]
    np.testing.assert_allclose((moments.mean_D[0], moments.deviation_D[0]), (kept.mean(), kept.std()), rtol=1e-12)


@pytest.mark.parametrize("constant", [1 / 3, 1.7e12 + 0.3, 0.0, -5e-8])
def test_a_constant_has_no_deviation(tmp_path, constant):
    schema = recipe_of(tmp_path).data_schema
    columns = rows(4 * GROUP_ROWS) | {"length": np.full(4 * GROUP_ROWS, constant)}
    moments = fitted_to(schema, write(tmp_path / "f.parquet", columns)).moments["length"]
    assert moments.deviation_D.tolist() == [0.0]
    assert abs(moments.apply(np.array([[constant]]))[0, 0]) < 1e-3


def test_a_small_spread_far_from_zero_is_kept(tmp_path):
    schema = recipe_of(tmp_path).data_schema
    times = 1.7e12 + np.arange(4 * GROUP_ROWS)
    moments = fitted_to(schema, write(tmp_path / "f.parquet", rows(len(times)) | {"length": times})).moments["length"]
    np.testing.assert_allclose(moments.deviation_D, np.arange(len(times)).std(), rtol=1e-6)


def test_most_rows_decide_what_a_column_holds(tmp_path):
    schema = recipe_of(tmp_path).data_schema
    odd = write(tmp_path / "train/a.parquet", rows(20) | {"user": [str(user) for user in rows(20)["user"]]})
    good = [write(tmp_path / f"train/{name}.parquet", rows(100, seed)) for seed, name in enumerate("bc")]
    listing = list_slices(schema, [odd, *good], labels=True)
    assert listing.num_rows == 200
    assert listing.bad_files[odd][0] == 20 and "holds strings, but integers in" in listing.bad_files[odd][1]


def test_another_cut_of_row_groups_is_refused_within_an_epoch(tmp_path):
    """Evaluation's columns are read too, so another one may cut row groups elsewhere."""

    def loader(**data):
        schema = replace(schema_, data=schema_.data.model_copy(update=data))
        return Loader(Decoder(schema, Fitted()), list_slices(schema, [path], labels=True).slices, rank=0, world_size=1, shuffle=True)

    schema_ = recipe_of(tmp_path, "data.memory_mb=1", "data.shuffle_row_groups=1").data_schema
    columns = rows(6000)
    path = str(tmp_path / "f.parquet")
    pq.write_table(pa.table(columns | {"name": [f"{row}" * 30 for row in range(6000)]}), path)
    state = loader().state_dict(ReadingPosition(0, 2500))
    assert loader().load_state_dict(state) == ReadingPosition(0, 2500)
    with pytest.raises(InputError, match="the cut of row groups into slices"):
        loader(scenario="name").load_state_dict(state)


class TestEntities:
    def entities(self, tmp_path, fitted, **changes):
        schema = recipe_of(tmp_path).data_schema
        columns = rows(4 * GROUP_ROWS) | changes
        out = tmp_path / "out.parquet"
        write_entities(schema, fitted, [write(tmp_path / "items.parquet", columns)], "item", out)
        return pq.read_table(out)

    def test_a_row_group_with_a_bad_row_is_left_out_before_the_newest_rows_are_chosen(self, tmp_path):
        schema = recipe_of(tmp_path).data_schema
        length = rows(4 * GROUP_ROWS)["length"].astype(np.float64)
        fitted = fitted_to(schema, write(tmp_path / "f.parquet", rows(200) | {"length": length}))
        length = np.where(np.arange(len(length)) == len(length) - 1, np.nan, length)
        found = self.entities(tmp_path, fitted, length=length)
        items = rows(4 * GROUP_ROWS)["item"][: 3 * GROUP_ROWS]
        assert found.column("item").to_pylist() == sorted(set(items.tolist()))

    def test_the_place_of_a_keyed_id_tells_nothing_of_it(self, tmp_path):
        schema = recipe_of(tmp_path).data_schema
        fitted = fitted_to(schema, write(tmp_path / "f.parquet", rows(200)))
        key = b"k" * 32
        found = self.entities(tmp_path, replace(fitted, keys={"item": key})).column("item")
        codes = keyed_codes(found.combine_chunks(), key)
        assert (codes[:-1] < codes[1:]).all() and found.to_pylist() != sorted(found.to_pylist())


def test_a_bad_value_in_valid_is_found_before_training(tmp_path):
    recipe = load_recipe(write_log(tmp_path))
    valid = rows(100)
    valid["length"] = valid["length"].astype(np.float64)
    train = rows(100) | {"length": rows(100)["length"].astype(np.float64)}
    write(tmp_path / "train.parquet", train)
    valid["length"][70] = np.nan
    write(tmp_path / "valid.parquet", valid)
    check_data(recipe, rows=False)
    with pytest.raises(InputError, match=r"valid\.parquet: row group 1: column 'length' .* NaN"):
        check_data(recipe)
    skipping = load_recipe(tmp_path / "recipe.toml", ["data.on_bad_file=skip"])
    check_data(skipping)
    valid["length"][:] = np.nan
    write(tmp_path / "valid.parquet", valid)
    with pytest.raises(InputError, match=r"no row of data\.valid can be read; first: .*valid\.parquet"):
        check_data(skipping)
