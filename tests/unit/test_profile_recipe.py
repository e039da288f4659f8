"""Roles guessed on made worlds, and the printed recipe: it loads, and says what the data are."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.small import rows as small_rows
from triptych.datasets.fitted import Fitted
from triptych.datasets.ids import table_rows
from triptych.datasets.profile.features import table_of
from triptych.datasets.profile.profile import profile_files
from triptych.datasets.profile.suggest import suggest
from triptych.datasets.schema import Feature, InputError, TableIds
from triptych.datasets.world import World, write_world
from triptych.launch.config import load_recipe
from triptych.launch.inspect import inspect, locate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(World(rows=20_000, users=1_500, items=400, seed=0), folder)
    return folder


def recipe_of(folder, tmp_path, capsys):
    inspect(str(folder), tmp_path / "recipe.toml", tmp_path / "profile.json")
    return load_recipe(tmp_path / "recipe.toml"), json.loads((tmp_path / "profile.json").read_text()), capsys.readouterr().out


def small_log(folder, name="train.parquet", **columns):
    """The small log of the other tests, 4,000 rows, with further columns."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({**small_rows(4_000), **columns}), folder / name, row_group_size=1_000)


def suggestion(folder, **columns):
    small_log(folder, **columns)
    return suggest(profile_files([str(folder / "train.parquet")]), {})


class TestWorld:
    def test_its_truth_is_left_out_and_all_else_has_its_role(self, world, tmp_path, capsys):
        recipe, profile, printed = recipe_of(world, tmp_path, capsys)
        assert {s["column"] for s in profile["suspects"]} == {"true_ctr", "true_cvr", "true_dwell"}
        roles = profile["roles"]
        assert (roles["user"], roles["item"], roles["time"], roles["scenario"]) == ("user_id", "item_id", "time_ms", "scenario")
        sides = {side: {f.name for f in recipe.features if f.side == side and f.buckets is None} for side in ("user", "item", "context")}
        assert sides["user"] == {"user_id", "age_band", "active_days", "days_registered", "minutes_per_day", "history"}
        assert sides["item"] == {"item_id", "category", "brand", "past_views", "price", "length_s", "tags"}
        assert sides["context"] == {"scenario", "position"}
        assert recipe.data_schema.feature("history").table == recipe.data_schema.feature("item_id").table
        assert recipe.data_schema.feature("tags").table != recipe.data_schema.feature("item_id").table
        assert "20,000" not in printed and "16,000 rows" in printed and "true_ctr" in printed

    def test_tasks_are_click_conversion_and_dwell_given_the_click(self, world, tmp_path, capsys):
        recipe, profile, _ = recipe_of(world, tmp_path, capsys)
        assert [(t.name, t.kind, t.given) for t in recipe.tasks] == [
            ("click", "binary", None),
            ("conversion", "binary", "click"),
            ("dwell_ms", "duration", "click"),
        ]
        dwell = pq.read_table(world / "train.parquet").column("dwell_ms").to_numpy() / 1000
        assert recipe.tasks[2].scale == 0.001
        assert recipe.tasks[2].cap == pytest.approx(np.quantile(dwell, 0.999), rel=0.06)
        assert profile["labels"]["click"]["rate"] == pytest.approx(0.2, abs=0.03)
        pairs = {(p["a"], p["b"]): p["correlation"] for p in profile["label_correlations"]}
        table = pq.read_table(world / "train.parquet")
        exact = np.corrcoef(table.column("click").to_numpy(), table.column("conversion").to_numpy())[0, 1]
        assert pairs["click", "conversion"] == pytest.approx(exact)

    def test_the_recipe_reads_all_splits_and_has_retrieval(self, world, tmp_path, capsys):
        recipe, _, _ = recipe_of(world, tmp_path, capsys)
        data = recipe.data
        assert (data.train, data.valid, data.test, data.items) == ("train.parquet", "valid.parquet", "test.parquet", "items.parquet")
        assert (data.group, data.time, data.scenario) == ("user_id", "time_ms", "scenario")
        assert recipe.retrieval is not None and (recipe.retrieval.user, recipe.retrieval.item) == ("user_id", "item_id")

    def test_piped_without_out_everything_printed_is_the_recipe(self, world, tmp_path, capsys):
        inspect(str(world), None, None)
        (tmp_path / "piped.toml").write_text(capsys.readouterr().out)
        inspect(str(world), tmp_path / "written.toml", None)
        assert load_recipe(tmp_path / "piped.toml") == load_recipe(tmp_path / "written.toml")
        assert not list(tmp_path.glob("*.part"))

    def test_the_profile_counts_exactly_what_is_exact(self, world, tmp_path, capsys):
        _, profile, _ = recipe_of(world, tmp_path, capsys)
        table = pq.read_table(world / "train.parquet")
        for name in ("user_id", "category", "position", "brand"):
            column = profile["columns"][name]
            counts = sorted(pc.value_counts(table.column(name)).field("counts").to_pylist(), reverse=True)
            assert (column["distinct"], column["distinct_is_exact"]) == (len(counts), True)
            assert column["head_share"] == {str(n): sum(counts[:n]) / len(table) for n in (1, 10, 100)}


class TestRoles:
    def test_of_the_small_log(self, tmp_path):
        found = suggestion(tmp_path / "log")
        assert (found.roles.user, found.roles.item, found.roles.labels, found.roles.durations) == (
            "user",
            "item",
            ["click", "buy"],
            ["dwell_ms"],
        )
        assert (found.roles.time, found.roles.scenario, found.suspects) == ("time_ms", "page", [])
        # 60 items: that `seen` holds the numbers 0 to 59 too may be by chance.
        assert (found.tables["bought"].column, found.tables["seen"].column) == ("user", "seen")

    def test_a_label_like_attribute_of_the_user_is_a_feature(self, tmp_path):
        user = small_rows(4_000)["user"]
        found = suggestion(tmp_path / "log", is_subscribed=user % 2)
        assert found.roles.sides["is_subscribed"] == "user" and "is_subscribed" not in found.roles.labels
        assert "an attribute, no label" in found.roles.why["is_subscribed"]
        assert "is_subscribed" in {feature.column for feature in found.features}

    def test_further_labels_are_tasks_by_frequency_or_comments_but_never_features(self, tmp_path):
        rng = np.random.default_rng(1)
        rates = {"share": 0.1, "like": 0.3, "follow": 0.2, "comment": 0.15, "report": 0.0005}
        found = suggestion(tmp_path / "log", **{name: (rng.random(4_000) < rate).astype(int) for name, rate in rates.items()})
        assert [task.label for task in found.tasks] == ["click", "like", "follow", "comment", "buy", "dwell_ms"]
        assert all(task.given is None for task in found.tasks if task.label in rates)
        assert {line.split(":")[0] for line in found.other_labels} == {"share", "report"}
        assert not set(rates) & {feature.column for feature in found.features}

    def test_a_duration_without_a_unit_and_with_time_before_the_click(self, tmp_path):
        seconds = np.random.default_rng(1).integers(1, 300, 4_000)
        task = {t.label: t for t in suggestion(tmp_path / "log", watch_time=seconds).tasks}["watch_time"]
        assert (task.scale, task.given, task.cap) == (1.0, None, 300.0)
        task = {t.label: t for t in suggestion(tmp_path / "other", watch_time=seconds * 1000).tasks}["watch_time"]
        assert (task.scale, task.cap) == (0.001, 300.0)

    def test_without_user_and_item_all_is_context_and_there_is_no_retrieval(self, tmp_path, capsys):
        rng = np.random.default_rng(0)
        columns = {"age": rng.integers(0, 91, 3_000), "state": pa.array([f"s{i}" for i in rng.integers(0, 9, 3_000)])}
        folder = tmp_path / "census"
        folder.mkdir()
        pq.write_table(pa.table({**columns, "label_rich": rng.integers(0, 2, 3_000)}), folder / "train.parquet")
        recipe, _, _ = recipe_of(folder, tmp_path, capsys)
        assert recipe.retrieval is None and {feature.side for feature in recipe.features} == {"context"}
        assert [task.name for task in recipe.tasks] == ["label_rich"] and recipe.train.epochs > 1


class TestFeatures:
    def test_nulls_get_a_default_that_does_not_occur(self, tmp_path):
        rng, hole = np.random.default_rng(0), np.arange(4_000) % 9 == 0
        found = suggestion(
            tmp_path / "log",
            code=pa.array(rng.integers(-3, 9, 4_000), mask=hole),
            small=pa.array(rng.integers(0, 9, 4_000), pa.uint8(), mask=hole),
            text=pa.array(rng.choice(["", "a"], 4_000), mask=hole),
            flag=pa.array(rng.random(4_000) < 0.5, mask=hole),
            number=pa.array(rng.normal(5, 1, 4_000).round(1), mask=hole),
        )
        defaults = {f.column: f.keys.get("default") for f in found.features if not f.suffix}
        assert (defaults["code"], defaults["small"], defaults["text"], defaults["flag"]) == (-4, 9, "(null)", 0)
        assert defaults["number"] == pytest.approx(5.0, abs=0.1)
        assert defaults["user"] is None

    def test_nulls_in_another_split_count_too(self, tmp_path, capsys):
        folder, codes = tmp_path / "log", np.arange(4_000) % 7
        small_log(folder, code=codes)
        small_log(folder, "valid.parquet", code=pa.array(codes, mask=codes == 3))
        recipe, _, _ = recipe_of(folder, tmp_path, capsys)
        assert recipe.data.valid == "valid.parquet" and recipe.data_schema.feature("code").default == -1

    def test_numbers_are_dense_with_a_log_where_the_tail_is_long(self, tmp_path):
        rng = np.random.default_rng(0)
        even, tail = rng.normal(0, 2, 4_000), rng.lognormal(3, 2, 4_000)
        found = suggestion(tmp_path / "log", even=even, tail=tail, few=rng.integers(0, 40, 4_000))
        keys = {f.column: f.keys for f in found.features if not f.suffix}
        assert keys["even"] == {"kind": "dense", "scale": pytest.approx(1 / even.std(), rel=0.05)}
        assert keys["tail"] == {"kind": "dense", "transform": "log1p", "scale": pytest.approx(1 / np.log1p(tail).std(), rel=0.05)}
        assert keys["few"] == {"kind": "id"}
        buckets = next(f.keys["buckets"] for f in found.features if f.column == "even" and f.suffix)
        counts = np.bincount(np.searchsorted(buckets, even, side="right"))
        assert len(counts) == 24 and counts.min() > 100

    def test_a_column_that_has_the_name_of_the_buckets_keeps_it(self, tmp_path):
        rng = np.random.default_rng(0)
        found = suggestion(tmp_path / "log", price=rng.normal(size=4_000), price_bucket=rng.integers(0, 9, 4_000))
        assert [(f.column, f.suffix) for f in found.features if f.column.startswith("price")] == [("price", ""), ("price_bucket", "")]

    def test_vectors_lists_and_odd_names(self, tmp_path, capsys):
        rng, folder = np.random.default_rng(0), tmp_path / "log"
        odd = {"a.b/c": rng.integers(0, 9, 4_000), "a b\nc@d": rng.integers(0, 9, 4_000), '"q"': rng.normal(size=4_000)}
        small_log(folder, image=pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=12_000)), 3), **odd)
        recipe, _, _ = recipe_of(folder, tmp_path, capsys)
        features = {feature.column: feature for feature in recipe.features}
        assert set(odd) <= set(features) and (features["image"].kind, features["image"].size) == ("vector", 3)
        assert (features["seen"].kind, features["seen"].max_length) == ("ids", 7)

    def test_few_values_do_not_share_a_row(self, tmp_path):
        pq.write_table(pa.table({"x": [f"value {i % 40}" for i in range(400)]}), tmp_path / "x.parquet")
        column = profile_files([str(tmp_path / "x.parquet")]).columns["x"]
        rows = table_of(column, [], column.distinct).rows
        feature, table = Feature(name="x", kind="id", table="x"), TableIds(name="x", rows=rows)
        found = table_rows(pa.array(column.all_values), feature, table, Fitted(), "")
        assert rows & (rows - 1) == 0 and len(set(found.tolist())) == 40


class TestSplits:
    def test_a_catalogue_without_an_attribute_of_the_item_makes_it_context(self, world, tmp_path, capsys):
        folder = tmp_path / "log"
        folder.mkdir()
        (folder / "train.parquet").symlink_to(world / "train.parquet")
        pq.write_table(pq.read_table(world / "items.parquet").drop_columns(["price"]), folder / "items.parquet")
        recipe, _, _ = recipe_of(folder, tmp_path, capsys)
        schema = recipe.data_schema
        assert recipe.data.items == "items.parquet"
        assert (schema.feature("price").side, schema.feature("brand").side) == ("context", "item")
        assert "price" not in {f.column for f in schema.features if f.side == "item"}

    @pytest.mark.parametrize(
        "change, reason",
        [
            (lambda t: t.drop_columns(["page"]), "it has no column page"),
            (
                lambda t: t.set_column(t.column_names.index("page"), "page", pa.array([1] * len(t))),
                "its column page is int64, but string in train",
            ),
            (
                lambda t: t.set_column(t.column_names.index("click"), "click", pa.array([2] * len(t))),
                "its label click is not always 0 or 1",
            ),
        ],
    )
    def test_a_split_that_does_not_fit_is_left_out_with_the_reason(self, tmp_path, capsys, change, reason):
        folder = tmp_path / "log"
        small_log(folder)
        pq.write_table(change(pq.read_table(folder / "train.parquet")), folder / "valid.parquet")
        recipe, _, _ = recipe_of(folder, tmp_path, capsys)
        assert recipe.data.valid is None
        assert f"# valid.parquet is left out: {reason}." in (tmp_path / "recipe.toml").read_text()

    def test_are_found_by_name_as_files_folders_and_parts(self, tmp_path, monkeypatch):
        for name in ("train/a.parquet", "train/b.parquet", "val-0.parquet", "val-1.parquet", "items.parquet", "testing.parquet"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            pq.write_table(pa.table({"x": [1]}), tmp_path / name)
        (tmp_path / "train.csv").write_text("x")
        splits = {"train": "train", "valid": "val[-_.0-9]*.parquet", "items": "items.parquet"}
        assert locate(str(tmp_path)) == {"root": str(tmp_path), **splits}
        monkeypatch.chdir(tmp_path.parent)
        assert locate(f"{tmp_path.name}/") == {"root": tmp_path.name, **splits}
        monkeypatch.chdir(tmp_path)
        assert locate(".") == {"root": ".", **splits}
        assert locate(f"file://{tmp_path}/") == {"root": f"file://{tmp_path}", **splits}

    def test_a_file_a_glob_and_a_folder_without_splits(self, tmp_path, monkeypatch):
        (tmp_path / "log").mkdir()
        pq.write_table(pa.table({"x": [1]}), tmp_path / "log" / "a.parquet")
        assert locate(str(tmp_path / "log" / "a.parquet")) == {"root": str(tmp_path / "log"), "train": "a.parquet"}
        assert locate(f"{tmp_path}/l*/*.parquet") == {"root": str(tmp_path), "train": "l*/*.parquet"}
        assert locate(str(tmp_path / "log")) == {"root": str(tmp_path), "train": "log"}
        assert locate(f"file://{tmp_path}/log/a.parquet") == {"root": f"file://{tmp_path}/log", "train": "a.parquet"}
        monkeypatch.chdir(tmp_path / "log")
        assert locate("a.parquet") == {"root": ".", "train": "a.parquet"}

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"no such file: .*nowhere"):
            locate(str(tmp_path / "nowhere"))
        with pytest.raises(InputError, match="without parquet files"):
            locate(str(tmp_path))


def test_an_unwritable_file_is_named(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/r\.toml: cannot write there"):
        inspect(str(world), Path(tmp_path / "file" / "r.toml"), None)
