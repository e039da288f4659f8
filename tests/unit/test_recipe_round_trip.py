"""A recipe survives being saved and read back; its paths are absolute, and what it means to a checkpoint is in `meaning`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_config import MINIMAL, RECIPE, numbers, texts, toml, write
from triptych.launch.config import load_recipe, meaning, save_recipe

positive = st.floats(1e-300, 1e300)

CHANGES = {
    "name": texts,
    "data.group": texts,
    "data.batch_size": st.integers(1, 2**40),
    "data.shuffle": st.booleans(),
    "data.memory_mb": st.integers(1, 2**40),
    "data.on_bad_file": st.sampled_from(["fail", "skip"]),
    "tables.words.min_count": st.integers(1, 2**40),
    "features.length.transform": st.sampled_from(["none", "log1p", "standard", "quantile"]),
    "tables.user.init": positive,
    "tables.words.dim": st.integers(1, 99).map(lambda quarter: 4 * quarter),
    "features.age.buckets": st.lists(st.floats(allow_nan=False, allow_infinity=False), unique=True, min_size=1).map(sorted),
    "features.length.scale": st.floats(allow_nan=False, allow_infinity=False),
    "features.page.default": st.one_of(numbers, texts),
    "tasks.dwell.cap": positive,
    "tasks.ctr.weight": st.floats(0, 1e300),
    "model.tower_layers": st.lists(st.integers(1, 999), max_size=4),
    "model.dropout": st.floats(0, 1, exclude_max=True),
    "train.lr": positive,
    "train.seed": st.integers(0, 2**32 - 1),
    "train.monitor": st.sampled_from(["ctr.auc", "cvr.ne", "dwell.xauc"]),
}


class TestRoundTrip:
    @settings(deadline=None, max_examples=60)
    @given(st.fixed_dictionaries({}, optional=CHANGES))
    def test_saved_recipe_reads_back_equal(self, tmp_path_factory, changes):
        folder = tmp_path_factory.getbasetemp()
        (folder / "rich.toml").write_text(RECIPE)
        recipe = load_recipe(folder / "rich.toml", [f"{key}={toml(value)}" for key, value in changes.items()])
        save_recipe(recipe, folder / "saved.toml")
        again = load_recipe(folder / "saved.toml")
        assert again == recipe and repr(again) == repr(recipe)
        save_recipe(again, folder / "again.toml")
        assert (folder / "again.toml").read_bytes() == (folder / "saved.toml").read_bytes()

    def test_defaults_read_back_equal(self, tmp_path):
        recipe = load_recipe(write(tmp_path, MINIMAL))
        save_recipe(recipe, tmp_path / "saved.toml")
        assert load_recipe(tmp_path / "saved.toml") == recipe
        assert recipe.retrieval is None and recipe.features[0].column == "item"

    @pytest.mark.parametrize("root, absolute", [("logs/a", "{cwd}/logs/a"), ("../b", "{cwd}/../b"), ("~/c", "{home}/c"), ("/d", "/d")])
    def test_root_becomes_absolute_wherever_it_is_read(self, tmp_path, monkeypatch, root, absolute):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        expected = absolute.format(cwd=tmp_path, home=tmp_path / "home").replace(f"{tmp_path}/..", str(tmp_path.parent))
        recipe = load_recipe(write(tmp_path, MINIMAL), [f"data.root={root}"])
        assert (recipe.data.root, recipe.data_schema.data.root) == (expected, expected)

    def test_a_key_file_becomes_absolute_and_is_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        for given_path, absolute in (("key", tmp_path / "key"), ("~/key", tmp_path / "home" / "key"), ("/key", "/key")):
            recipe = load_recipe(write(tmp_path, RECIPE), [f"tables.user.key_file={given_path}"])
            assert recipe.tables[0].key_file == recipe.data_schema.tables[0].key_file == str(absolute)

    def test_a_url_as_root_stays_one(self, tmp_path):
        assert load_recipe(write(tmp_path, MINIMAL), ["data.root=s3://bucket/logs/./a/"]).data.root == "s3://bucket/logs/a"


class TestMeaning:
    def of(self, tmp_path, *overrides):
        return meaning(load_recipe(write(tmp_path, RECIPE), overrides))

    @pytest.mark.parametrize(
        "override",
        [
            "tables.user.rows=98",
            "tables.words.min_count=3",
            "features.pixels.transform=log1p",
            "tasks.ctr.nulls=fail",
            "tasks.dwell.cap=61",
        ],
    )
    def test_what_changes_a_models_numbers_changes_it(self, tmp_path, override):
        assert self.of(tmp_path, override) != self.of(tmp_path)

    @pytest.mark.parametrize(
        "override",
        ["tables.user.sharding=auto", "tables.user.key_file=/moved", "data.workers=0", "train.lr=0.5", "tasks.ctr.weight=3", "name=x"],
    )
    def test_what_may_differ_between_runs_does_not(self, tmp_path, override):
        assert self.of(tmp_path, override) == self.of(tmp_path)
