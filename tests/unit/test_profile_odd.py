"""Logs with something odd: labels with nulls or NaN, huge numbers, columns without a name, nothing to train on."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small import rows as small_rows
from tests.unit.test_profile_recipe import recipe_of, small_log, suggestion
from triptych.launch.inspect import inspect


class TestNulls:
    def test_outcomes_with_nulls_are_tasks_that_mask_them(self, tmp_path, capsys):
        rng, hole = np.random.default_rng(1), np.arange(4_000) % 10 == 5
        follow, seconds = rng.integers(0, 2, 4_000), rng.integers(0, 300, 4_000)
        small_log(tmp_path / "log", follow=pa.array(follow, mask=hole), watch_seconds=pa.array(seconds, mask=hole))
        recipe, profile, _ = recipe_of(tmp_path / "log", tmp_path, capsys)
        assert {t.name: t.nulls for t in recipe.tasks} == {
            "click": "fail",
            "follow": "mask",
            "buy": "fail",
            "dwell_ms": "fail",
            "watch_seconds": "mask",
        }
        assert profile["suspects"] == [] and not {"follow", "watch_seconds"} & {f.column for f in recipe.features}
        assert profile["labels"]["follow"]["rate"] == pytest.approx(follow[~hole].mean())
        text = (tmp_path / "recipe.toml").read_text().replace("\n# ", " ")
        assert f"1 in {follow[~hole].mean():.1%} of the rows that have it;" in text
        assert text.count("; 400 nulls: those rows teach this task nothing") == 2

    def test_a_label_that_is_null_without_a_click_is_given_the_click(self, tmp_path):
        rng, click = np.random.default_rng(1), small_rows(4_000)["click"]
        share = pa.array(rng.integers(0, 2, 4_000), mask=click == 0)
        found = suggestion(tmp_path / "log", share=share, watch_seconds=pa.array(rng.integers(0, 300, 4_000), mask=click == 0))
        tasks = {task.label: task for task in found.tasks}
        assert [(tasks[name].given, tasks[name].nulls) for name in ("share", "watch_seconds")] == [("click", "mask")] * 2
        assert "0 or null wherever click is 0" in tasks["watch_seconds"].why

    def test_nulls_of_a_label_in_another_split_are_masked_too(self, tmp_path, capsys):
        folder, click = tmp_path / "log", small_rows(4_000)["click"]
        small_log(folder)
        small_log(folder, "valid.parquet", click=pa.array(click, mask=np.arange(4_000) == 7))
        recipe, _, _ = recipe_of(folder, tmp_path, capsys)
        assert recipe.data.valid == "valid.parquet" and recipe.tasks[0].nulls == "mask"
        assert "1 nulls in other splits" in (tmp_path / "recipe.toml").read_text()

    def test_an_outcome_with_nan_is_no_task(self, tmp_path):
        rng, hole = np.random.default_rng(1), np.arange(4_000) == 5
        follow, seconds = rng.integers(0, 2, 4_000).astype(float), rng.integers(0, 300, 4_000).astype(float)
        follow[hole], seconds[hole] = np.nan, np.nan
        found = suggestion(tmp_path / "log", follow=follow, watch_seconds=seconds)
        assert [task.label for task in found.tasks] == ["click", "buy", "dwell_ms"]
        assert [(s.column, s.reason) for s in found.suspects] == [
            ("follow", "looks like a label, but holds 1 NaN: make them nulls, which a task can mask"),
            ("watch_seconds", "looks like a duration, but holds 1 NaN: make them nulls, which a task can mask"),
        ]


class TestOddLogs:
    @pytest.mark.filterwarnings("error")
    def test_huge_numbers_and_a_column_without_a_name_are_left_out(self, tmp_path, capsys):
        rng, folder = np.random.default_rng(0), tmp_path / "log"
        huge = rng.choice([1e300, -1e300], 4_000)
        moment = pa.array(np.arange(4_000), pa.timestamp("s"))
        small_log(folder, **{"": moment, "one": np.full(4_000, 1e300), "two": huge, "wide": rng.normal(0, 1e25, 4_000).round()})
        recipe, profile, _ = recipe_of(folder, tmp_path, capsys)
        assert {s["column"]: s["reason"] for s in profile["suspects"]} == {
            "": "has no name: give it one",
            "one": "holds numbers from 1e+300 to 1e+300, beyond what a float32 holds",
            "two": "holds numbers from -1e+300 to 1e+300, beyond what a float32 holds",
        }
        assert (recipe.data.time, recipe.data_schema.feature("wide").kind) == ("time_ms", "dense")
        assert profile["columns"]["two"]["std"] == pytest.approx(1e300, rel=1e-3)

    def test_the_profile_is_json(self, tmp_path, capsys):
        folder, numbers = tmp_path / "log", np.arange(4_000) / 7
        numbers[:2_000] = np.inf
        small_log(folder, odd=numbers)
        inspect(str(folder), tmp_path / "recipe.toml", tmp_path / "profile.json")

        def refuse(name):
            raise AssertionError(name)

        odd = json.loads((tmp_path / "profile.json").read_text(), parse_constant=refuse)["columns"]["odd"]
        assert (odd["infinite"], odd["top"][0]) == (2_000, [None, 2_000])

    def test_what_cannot_train_yet_says_what_is_missing(self, tmp_path, capsys):
        rng, age = np.random.default_rng(0), np.random.default_rng(1).normal(40, 10, 3_000).round(1)
        ids = pa.array([f"s{i}" for i in rng.integers(0, 9, 3_000)])
        one_value = pa.array([1] * 3_000)
        logs = {
            "tasks": {"age": age, "state": ids},
            "tables": {"version": one_value, "click": rng.integers(0, 2, 3_000)},
            "both": {"version": one_value},
            "none": {"state": ids, "click": rng.integers(0, 2, 3_000)},
        }
        missing = {"tasks": ["[[tasks]]"], "tables": ["[[tables]]"], "both": ["[[tasks]]", "[[tables]]"], "none": []}
        for name, columns in logs.items():
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
            out = tmp_path / f"{name}.toml"
            inspect(str(tmp_path / f"{name}.parquet"), out, None)
            last, head = capsys.readouterr().out.splitlines()[-1], out.read_text().split("\nname = ")[0]
            said = " ".join(line.removeprefix("# ") for line in head.splitlines())
            for text in (last, said):
                assert ("triptych train" in text) == (not missing[name]), text
                assert ("cannot train yet" in text) == bool(missing[name])
                assert [part for part in ("[[tasks]]", "[[tables]]") if f"add a {part} part" in text] == missing[name]
