"""The Dockerfile: checked by a linter, built for real on a bare Debian, and its image used as schedulers use it."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torchx.workspace.api import walk_workspace

from tests.torchx_request import request

ROOT = Path(__file__).parents[2]
BASE, IMAGE, REVISION = "localhost/debian:bookworm-slim", "localhost/triptych", "0123abcd"
BUILD_SECONDS = 1200
TOOLS = ("buildah", "debootstrap", "unshare")


def run(*command: object, timeout: float = 60) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


def test_linter_finds_nothing() -> None:
    assert run(Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", ROOT / "Dockerfile") == ""


def test_every_ignored_rule_has_its_reason() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        assert "hadolint ignore" not in line or before.startswith("# ")
    assert not (ROOT / ".hadolint.yaml").exists()


@pytest.mark.parametrize("rules", [".dockerignore", ".torchxignore"])
def test_copies_hold_what_git_tracks_less_its_tests(rules: str) -> None:
    """As TorchX reads the rules, which lays the checkout over an image or into a job's folder."""
    walked = walk_workspace(fsspec.filesystem("file"), str(ROOT), rules)
    copied = {os.path.relpath(os.path.join(folder, file), ROOT) for folder, _, files in walked for file in files}
    tracked = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    assert copied == {path for path in tracked if path.split("/")[0] not in {"tests", "docs", ".ci"} and (ROOT / path).exists()}


class Builder:
    """Buildah, with images and containers in a folder of their own. What it mounts is gone with each command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = ["--root", folder / "images", "--runroot", folder / "run", "--storage-driver", "overlay"]
        self.buildah = [str(part) for part in ("unshare", "--mount", "--", "buildah", *storage)]

    def call(self, *command: object, timeout: float = 60) -> str:
        return run(*self.buildah, *command, timeout=timeout).strip()

    def make_base(self) -> None:
        """What the public base image is made of: Debian's smallest root."""
        root, archive = self.folder / "root", self.folder / "root.tar"
        run("unshare", "--mount", "--", "debootstrap", "--variant=minbase", "bookworm", root, timeout=BUILD_SECONDS)
        run("tar", "--create", "--numeric-owner", "--file", archive, "--directory", root, ".")  # keeps owners, which copies lose
        container = self.call("from", "scratch")
        self.call("add", container, archive, "/", timeout=300)
        self.call("commit", "--quiet", "--rm", container, BASE, timeout=300)

    def build(self, **args: str) -> None:
        volumes = [part for volume in pip_of_this_machine(self.folder / "pip") for part in ("--volume", volume)]
        given = [part for name, value in args.items() for part in ("--build-arg", f"{name}={value}")]
        isolation = ["--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker", "--layers"]
        self.call("build", *isolation, *volumes, *given, "--tag", IMAGE, ROOT, timeout=BUILD_SECONDS)

    @contextlib.contextmanager
    def container(self) -> Iterator[list[str]]:
        """The start of a command that runs in a container, without a network."""
        # As an engine does: its own name is in /etc/hosts.
        name = self.call("from", "--pull-never", "--add-host", "inside:127.0.0.1", IMAGE)
        lonely = ["unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        try:
            yield [
                *lonely,
                *self.buildah,
                "run",
                "--isolation",
                "chroot",
                "--network",
                "host",
                "--hostname",
                "inside",
                name,
                "--",
            ]
        finally:
            self.call("rm", name)


def pip_of_this_machine(folder: Path) -> list[str]:
    """Volumes that let pip in a build find packages as it does here: its settings, and the local folders that they name."""
    folder.mkdir()
    settings = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        settings[name.split(".", 1)[1].lstrip(".")] = str(ast.literal_eval(value))
    if certificates := settings.get("cert"):
        shutil.copy(certificates, folder / "certificates.crt")
        settings["cert"] = "/run/pip/certificates.crt"
    config = folder / "pip.conf"
    config.write_text("\n".join(["[global]", *(f"{name} = {' '.join(value.split())}" for name, value in settings.items())]) + "\n")
    paths = [Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()]
    # Of an index of pages its files lie beside them.
    folders = {Path(*path.parts[:3]) for path in paths if path.is_absolute() and path.is_dir()}
    return [f"{folder}:/run/pip:ro", f"{config}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(folders))]


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)} (Debian: apt-get install buildah debootstrap)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to build an image on a bare Debian")
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs to make namespaces")
    with tempfile.TemporaryDirectory(prefix="triptych_image_") as folder:
        builder = Builder(Path(folder))
        builder.make_base()
        builder.build(TRIPTYCH_REVISION=REVISION)
        yield builder


def test_configuration_is_what_schedulers_expect(builder: Builder) -> None:
    inspected: Any = json.loads(builder.call("inspect", IMAGE))
    config = inspected["Docker"]["config"]
    # A scheduler's command would become an entry point's arguments.
    assert not config["Entrypoint"] and config["Cmd"] == ["triptych", "--help"]
    assert config["User"].isdecimal() and config["User"] != "0"  # a number: Kubernetes can see that it is not root
    env = dict(variable.split("=", 1) for variable in config["Env"])
    assert env["TRIPTYCH_REVISION"] == REVISION and env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_VISIBLE_DEVICES" not in env


def test_a_change_of_code_keeps_the_large_layer(builder: Builder) -> None:
    made = [layer["created_by"] for layer in json.loads(builder.call("inspect", IMAGE))["Docker"]["history"]]
    (torch,) = [number for number, command in enumerate(made) if "make torch" in command]
    (code,) = [number for number, command in enumerate(made) if "COPY dir:" in command]
    assert torch < code


def test_image_trains_as_a_scheduler_starts_it(builder: Builder) -> None:
    with builder.container() as inside:
        assert "Usage: triptych" in run(*inside, "triptych", "--help")
        where = run(*inside, "bash", "-c", "id -u; pwd; command -v python torchrun").splitlines()
        assert where == ["1000", "/opt/triptych", "/opt/triptych/.venv/bin/python", "/opt/triptych/.venv/bin/torchrun"]
        code = set(run(*inside, "ls").split())
        assert {"datasets", "embeddings", "mmoe", "launch", "triptych.py"} <= code and not {"tests", "runs", "build"} & code
        tools = subprocess.run([*inside, "python", "-c", "import pytest"], capture_output=True, text=True, timeout=60, check=False)
        assert "No module named 'pytest'" in tools.stderr
        run(*inside, "triptych", "synth", "--out", "/tmp/world", "--rows", "4000", timeout=300)
        run(*inside, *pod_command("--recipe", "demo", "--set", "data.root=/tmp/world", "--run", "/tmp/run", "--ranks", "2"), timeout=300)
        metrics = json.loads(run(*inside, "cat", "/tmp/run/result.json"))
        assert set(metrics["tasks"]) == {"ctr", "cvr", "dwell"}


def pod_command(*args: str) -> list[str]:
    """What Kubernetes would start in a container."""
    job = request("train", "--image", IMAGE, *args, scheduler="kubernetes", cfg={"queue": "default"}).resource
    (container,) = job["spec"]["tasks"][0]["template"].spec.containers
    return list(container.command)
