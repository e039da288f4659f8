"""The checkout's .torchxconfig: it changes nothing as it is, and every line of it does what it says once its # is gone."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.runner.config import apply, get_configs, load_sections
from torchx.schedulers import get_scheduler_factories
from torchx.specs.finder import get_component

ROOT = Path(__file__).parents[2]
CONFIG = (ROOT / ".torchxconfig").read_text(encoding="utf-8")
SETTING = re.compile(r"^# (?=\[|# |[\w-]+ =)", re.MULTILINE)
SECTION = re.compile(r"^# \[([^\]]+)\]$", re.MULTILINE)
SECTIONS = SECTION.findall(CONFIG)
SCHEDULERS = [name for name in SECTIONS if ":" not in name]
COMPONENT = "launch/component.py:train"


@pytest.fixture
def uncommented(tmp_path: Path) -> list[str]:
    """The folder of the file whose settings all hold."""
    text = SETTING.sub("", CONFIG)
    (tmp_path / ".torchxconfig").write_text(text, encoding="utf-8")
    return [str(tmp_path)]


def test_as_it_is_it_changes_nothing() -> None:
    assert all(line.startswith("#") for line in CONFIG.splitlines() if line)
    for scheduler in SCHEDULERS:
        taken: dict[str, Any] = {}
        apply(scheduler, taken, [str(ROOT)])
        assert taken == {}
    assert load_sections("component", [str(ROOT)]) == {} == load_sections("cli", [str(ROOT)])


def test_schedulers_that_containers_and_clusters_have() -> None:
    assert {"local_cwd", "local_docker", "slurm", "kubernetes", "aws_batch"} <= set(SCHEDULERS) <= set(get_scheduler_factories())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_option_is_one_of_the_schedulers(scheduler: str, uncommented: list[str], caplog: pytest.LogCaptureFixture) -> None:
    taken: dict[str, Any] = {}
    with caplog.at_level(logging.WARNING):
        apply(scheduler, taken, uncommented)
    assert not caplog.records  # TorchX passes over what it does not know, with a warning
    options = get_scheduler_factories()[scheduler](session_name="test").run_opts()
    written = re.findall(r"^([\w-]+) =", SETTING.sub("", _section(scheduler)), re.MULTILINE)
    assert list(taken) == written and set(taken) <= {name for name, _ in options}
    options.resolve(taken)  # types, and no required option is missing


def _section(name: str) -> str:
    return CONFIG.split(f"# [{name}]\n")[1].split("\n# [")[0]


def test_a_misspelt_option_would_be_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".torchxconfig").write_text(SETTING.sub("", CONFIG).replace("partition =", "partitions ="), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        apply("slurm", {}, [str(tmp_path)])
    assert "partitions" in caplog.text


def test_arguments_of_the_component(uncommented: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = load_sections("component", uncommented)
    assert list(given) == [COMPONENT]
    assert set(given[COMPONENT]) <= set(inspect.signature(get_component(COMPONENT).fn).parameters)
    with get_runner(component_defaults=given) as runner:
        cfg = {"queue": "default"}
        with pytest.warns(UserWarning, match="configured with restarts"):
            dryrun = runner.dryrun_component(COMPONENT, ["--recipe", "r.toml", "--run", "/mnt/run"], "kubernetes", cfg, workspace=None)
    assert dryrun._app is not None
    (role,) = dryrun._app.roles
    assert (role.image, role.num_replicas, role.resource.gpu, role.max_retries) == ("registry.example.com/team/triptych:1", 2, 8, 3)
    assert role.env["GLOO_SOCKET_IFNAME"] == "eth0" and role.env["PET_MAX_RESTARTS"] == "3"
    assert len(role.mounts) == 1


def test_arguments_of_torchx_run(uncommented: list[str]) -> None:
    assert get_configs("cli", "run", uncommented) == {"scheduler": "slurm", "workspace": ""}
