"""The report of a split composes the metrics by condition and scenario, in the shape of result.json."""

import json
from dataclasses import replace

import numpy as np
import pytest

from triptych.mmoe import metrics
from triptych.mmoe.metrics import TaskColumns


def close(value, rel=1e-9):
    if isinstance(value, dict):
        return {key: close(entry, rel) for key, entry in value.items()}
    return value if value is None else pytest.approx(value, rel=rel, abs=rel / 1000)


class TestReport:
    """click -> add -> buy, and the time spent given add; where its condition does not hold, a label may be NaN or anything."""

    @pytest.fixture
    def split(self):
        random = np.random.default_rng(5)
        click_N, add_N, buy_N = (random.random((3, 300)) < 0.6).astype(float)
        spent_N, meaningless_N = random.exponential(20, 300), random.random(300) < 0.5
        add_N[(click_N == 0) & meaningless_N] = np.nan
        for label_N in (buy_N, spent_N):
            label_N[(click_N * add_N != 1) & meaningless_N] = np.nan
        p = random.random((3, 300), np.float32)
        tasks = [
            TaskColumns("buy", "binary", "add", p[2], buy_N),
            TaskColumns("click", "binary", None, p[0], click_N),
            TaskColumns("add", "binary", "click", p[1], add_N),
            TaskColumns("spent", "duration", "add", 30 * p[2], spent_N),
        ]
        sides = {"group_N": random.integers(0, 20, 300), "weight_N": random.integers(0, 3, 300) / 2}
        return tasks, sides, random.choice(["feed", "search", "push"], 300, p=[0.2, 0.5, 0.3])

    def test_a_chain_of_conditions(self, split):
        (buy, click, add, spent), sides, _ = split
        p_click, p_add, p_buy, seconds = (task.prediction_N.astype(np.float64) for task in (click, add, buy, spent))
        group_N, weight_N = sides.values()

        def binary(rows, probability_N, label_N):
            return metrics.binary_metrics(probability_N[rows], label_N[rows], group_N[rows], weight_N[rows])

        everywhere, clicked = np.full(300, True), click.label_N == 1
        added = clicked & (add.label_N == 1)
        bought = added & (buy.label_N == 1)
        joint_spent = metrics.duration_metrics(p_click * p_add * seconds, np.where(added, spent.label_N, 0), weight_N)
        expected = {
            "click": {"kind": "binary"} | binary(everywhere, p_click, click.label_N),
            "add": {"kind": "binary", "given": "click"} | binary(clicked, p_add, add.label_N),
            "buy": {"kind": "binary", "given": "add"} | binary(added, p_buy, buy.label_N),
            "spent": {"kind": "duration", "given": "add"} | metrics.duration_metrics(seconds[added], spent.label_N[added], weight_N[added]),
        }
        result = metrics.report(split[0], **sides)
        joint = {name: entry.pop("joint") for name, entry in result["tasks"].items() if "joint" in entry}
        assert result == {"tasks": expected} and list(result["tasks"]) == ["buy", "click", "add", "spent"]
        assert joint == {
            "add": close(binary(everywhere, p_click * p_add, added)),
            "buy": close(binary(everywhere, p_click * p_add * p_buy, bought)),
            "spent": close(joint_spent),
        }

    def test_nulls_count_for_nothing_in_their_task_and_in_those_given_it(self, split):
        (_, click, add, _), sides, scenario_N = split
        random, none = np.random.default_rng(9), np.zeros(300, bool)
        clicked, added = click.label_N == 1, (click.label_N == 1) & (add.label_N == 1)
        nulls = {name: random.random(300) < 0.2 for name in ("click", "add", "spent")}
        nulls["add"] &= clicked & ~nulls["click"]
        nulls["spent"] &= added & ~nulls["click"] & ~nulls["add"]
        # Where a label is null it is 0, and so is what it would decide.
        masked = [
            replace(task, null_N=nulls.get(task.name), label_N=np.where(nulls.get(task.name, none), 0, task.label_N)) for task in split[0]
        ]
        found = metrics.report(masked, **sides, scenario_N=scenario_N)
        chains = {"click": ["click"], "add": ["add", "click"], "buy": ["buy", "add", "click"], "spent": ["spent", "add", "click"]}
        for name, chain in chains.items():
            known = ~np.logical_or.reduce([nulls.get(link, none) for link in chain])
            assert 0 < known.sum() < 300
            kept = [replace(task, prediction_N=task.prediction_N[known], label_N=task.label_N[known]) for task in split[0]]
            alone = metrics.report(kept, **{key: column[known] for key, column in sides.items()}, scenario_N=scenario_N[known])
            assert found["tasks"][name] == alone["tasks"][name]
            assert {scenario: found["scenarios"][scenario][name] for scenario in alone["scenarios"]} == {
                scenario: entry[name] for scenario, entry in alone["scenarios"].items()
            }

    @pytest.mark.parametrize("values", [[3, -1, 2], ["c", "a", "b"], [None, "a", 7]])
    def test_scenarios_are_the_same_metrics_on_fewer_rows(self, split, values):
        tasks, sides, scenario_N = split
        names = ["search", "push", "feed"]  # by falling number of rows
        values_N = np.array(values, object if None in values else None)[[names.index(name) for name in scenario_N]]
        scenarios = metrics.report(tasks, **sides, scenario_N=values_N)["scenarios"]
        assert list(scenarios) == [str(value) for value in values]
        without_push = sides | {"weight_N": scenario_N != "push"}
        assert list(metrics.report(tasks, **without_push, scenario_N=values_N)["scenarios"]) == [str(values[0]), str(values[2])]
        for name, scenario in zip(names, scenarios.values(), strict=True):
            rows = scenario_N == name
            fewer = [TaskColumns(task.name, task.kind, task.given, task.prediction_N[rows], task.label_N[rows]) for task in tasks]
            alone = metrics.report(fewer, **{key: column[rows] for key, column in sides.items()})["tasks"]
            assert scenario == {task: {key: alone[task][key] for key in alone[task].keys() - {"kind", "given", "joint"}} for task in alone}

    def test_keys_are_those_of_result_json(self, split):
        tasks, sides, scenario_N = split
        result = json.loads(json.dumps(metrics.report(tasks, **sides, scenario_N=scenario_N), allow_nan=False))
        binary = ["rows", "positives", "auc", "gauc", "ne", "logloss", "calibration"]
        duration = ["rows", "mae", "rmse", "xauc", "calibration"]
        assert list(result) == ["tasks", "scenarios"]
        assert list(result["tasks"]["click"]) == ["kind", *binary]
        assert list(result["tasks"]["add"]) == ["kind", "given", *binary, "joint"]
        assert list(result["tasks"]["spent"]) == ["kind", "given", *duration, "joint"]
        assert [list(result["tasks"][name]["joint"]) for name in ("add", "spent")] == [binary, duration]
        assert [list(metrics) for metrics in result["scenarios"]["feed"].values()] == [binary, binary, binary, duration]
        assert "gauc" not in metrics.report(tasks)["tasks"]["click"] and "scenarios" not in metrics.report(tasks)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"given": "view"}, "task add: given 'view' is no binary task; binary tasks: click, add, buy"),
            ({"given": "spent"}, "task add: given 'spent' is no binary task; binary tasks: click, add, buy"),
            ({"given": "buy"}, "task add: its chain of given runs in a circle"),
            ({"given": "add"}, "task add: its chain of given runs in a circle"),
            ({"name": "click"}, "task names repeat: click, click, buy, spent"),
            ({"kind": "count"}, "task add: no metrics for kind 'count'; kinds: binary, duration"),
            ({"prediction_N": np.full(300, np.nan)}, r"task add: \d+ of \d+ predictions are not finite"),
            ({"label_N": np.zeros(7)}, r"columns are not flat and of one length but of shapes \(7,\), \(300,\)"),
        ],
    )
    def test_refusals_name_the_task(self, split, changes, message):
        buy, click, add, spent = split[0]
        tasks = [click, replace(add, **changes), buy, spent]
        with pytest.raises(ValueError, match=f"^{message}$"):
            metrics.report(tasks)
