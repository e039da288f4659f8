"""The recipe that inspect prints trains as printed, and leaves out what gives labels away."""

import json

from tests.command import refused, succeeds, triptych
from triptych.launch.config import load_recipe


def test_a_world_is_inspected_and_trained_as_printed(tmp_path):
    succeeds("synth", "--out", "world", "--rows", "20000", "--users", "2000", "--items", "500", cwd=tmp_path)
    (tmp_path / "printed.toml").write_text(succeeds("inspect", "world", cwd=tmp_path))
    succeeds("inspect", "world", "--out", "written.toml", "--json", "profile.json", cwd=tmp_path)
    recipe = load_recipe(tmp_path / "printed.toml")
    assert recipe.features == load_recipe(tmp_path / "written.toml").features
    assert not {"true_ctr", "true_cvr", "true_dwell"} & {feature.column for feature in recipe.features}
    assert {"click", "conversion"} <= {task.label for task in recipe.tasks}
    assert json.loads((tmp_path / "profile.json").read_text())["rows"] == 16_000
    succeeds("train", "--recipe", "printed.toml", "--run", "run", cwd=tmp_path)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tasks"]["click"]["auc"] > 0.6


def test_a_path_without_data_is_one_line(tmp_path):
    assert "nowhere" in refused(triptych("inspect", "nowhere", cwd=tmp_path))
