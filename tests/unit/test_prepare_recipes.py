"""A bundled recipe reads nothing that `prepare` does not write."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit import test_prepare_aliccp, test_prepare_aliexpress, test_prepare_census, test_prepare_kuairand
from triptych.datasets.prepare.catalogue import LOGS, prepare
from triptych.launch.config import load_recipe


def write_raw(name, folder):
    if name == "kuairand":
        test_prepare_kuairand.write_source(folder, 100)
    elif name == "aliccp":
        test_prepare_aliccp.write(folder, 40, 300)
    else:
        for split, num_rows in (("train", 100), ("test", 50)):
            if name == "aliexpress":
                test_prepare_aliexpress.write(folder / "AliExpress_NL" / f"{split}.csv", num_rows, 0)
            else:
                test_prepare_census.write(folder / f"census-income.{'data' if split == 'train' else 'test'}", num_rows, 0)


@pytest.mark.parametrize("name", LOGS)
def test_every_column_that_the_recipe_reads_is_there(name, tmp_path):
    write_raw(name, tmp_path / "raw")
    prepare(name, tmp_path / "raw", tmp_path / "out", lambda done, total: None)
    recipe = load_recipe(name)
    asked = {feature.column for feature in recipe.features} | {task.label for task in recipe.tasks}
    asked |= {column for column in (recipe.data.scenario, recipe.data.group, recipe.data.time, recipe.data.weight) if column}
    for file in filter(None, (recipe.data.train, recipe.data.valid, recipe.data.test)):
        schema = pq.read_schema(tmp_path / "out" / file)
        assert asked <= set(schema.names)
        for feature in recipe.features:
            is_list = pa.types.is_list(schema.field(feature.column).type)
            assert is_list == (feature.kind == "ids")
            assert feature.kind != "dense" or not pa.types.is_large_string(schema.field(feature.column).type)
    if recipe.data.items is not None:
        items = set(pq.read_schema(tmp_path / "out" / recipe.data.items).names)
        assert {feature.column for feature in recipe.features if feature.side == "item"} <= items


@pytest.mark.parametrize(("name", "secrets"), [("census", {"hs_college", "row_id"}), ("kuairand", {"play_time_ms", "is_like", "is_hate"})])
def test_no_feature_gives_a_label_away(name, secrets):
    assert not {feature.column for feature in load_recipe(name).features} & secrets
