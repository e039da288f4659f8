"""The recipe that inspect prints trains as printed, and leaves out what gives labels away."""

import json
import subprocess
import sys
from pathlib import Path

from triptych.launch.config import load_recipe

ROOT = Path(__file__).parents[2]


def triptych(*arguments, cwd):
    command = [sys.executable, "-m", "triptych.launch.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_world_is_inspected_and_trained_as_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert triptych("synth", "--out", "world", "--rows", "20000", "--users", "2000", "--items", "500", cwd=tmp_path).returncode == 0
    printed = triptych("inspect", "world", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "printed.toml").write_text(printed.stdout)
    written = triptych("inspect", "world", "--out", "written.toml", "--json", "profile.json", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    recipe = load_recipe(tmp_path / "printed.toml")
    assert recipe.features == load_recipe(tmp_path / "written.toml").features
    assert not {"true_ctr", "true_cvr", "true_dwell"} & {feature.column for feature in recipe.features}
    assert {"click", "conversion"} <= {task.label for task in recipe.tasks}
    assert json.loads((tmp_path / "profile.json").read_text())["rows"] == 16_000
    trained = triptych("train", "--recipe", "printed.toml", "--run", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tasks"]["click"]["auc"] > 0.6


def test_a_path_without_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    refused = triptych("inspect", "nowhere", cwd=tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1 and "nowhere" in refused.stderr
