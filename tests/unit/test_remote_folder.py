"""A folder at a URL behaves as a dictionary of names and contents; what fails is one line that names the URL."""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.schema import InputError
from triptych.datasets.storage.access import StorageError
from triptych.launch.checkpoints.manifest import chosen_step
from triptych.launch.nodes import remote as remote_module
from triptych.launch.nodes.mirror import CACHE, RunAtUrl, located
from triptych.launch.nodes.remote import RemoteFolder, check_folder, check_output, deliver, delivered, is_remote, local_path

NAMES = st.sampled_from(["a", "b.json", "deep/a", "deep/b c", "deep/er/a", "step_3/x%20", "é"])
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["put", "write", "delete", "move", "delete_folder"]), NAMES, NAMES, st.binary(max_size=50)), max_size=12
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "BLOCK_BYTES", 16)


@pytest.mark.parametrize("scheme", ["memory", "local"])
@given(actions=ACTIONS)
@settings(max_examples=60, deadline=None)
def test_it_is_a_dictionary(scheme: str, actions: list[tuple[str, str, str, bytes]]) -> None:
    held: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = RemoteFolder(f"memory://{uuid.uuid4().hex}/run" if scheme == "memory" else f"local://{scratch}/run")
        for action, name, other, content in actions:
            if action == "put":
                (Path(scratch) / "file").write_bytes(content)
                folder.put(Path(scratch) / "file", name)
                held[name] = content
            elif action == "write":
                folder.write(content, name)
                held[name] = content
            elif action == "delete":
                folder.delete(name)
                held.pop(name, None)
            elif action == "delete_folder":
                folder.delete_folder("deep")
                held = {name: content for name, content in held.items() if not name.startswith("deep/")}
            elif name in held and other != name:
                folder.move(name, other)
                held[other] = held.pop(name)
            assert folder.files("") == sorted(held)
        assert folder.files("", without="deep") == sorted(name for name in held if not name.startswith("deep/"))
        assert folder.sizes(["a", "deep", "deep/a"]) == [len(held[name]) if name in held else None for name in ("a", "deep", "deep/a")]
        assert folder.read("none") is None
        for name, content in held.items():
            assert folder.read(name) == content
            assert folder.fetch(name, Path(scratch) / "here" / name) == (len(content), hashlib.sha256(content).hexdigest())
            assert (Path(scratch) / "here" / name).read_bytes() == content
        assert not list(Path(scratch).rglob("*" + remote_module.FETCHING))
        assert {name.partition("/")[0] for name in held if "/" in name} <= set(folder.folders(""))


def test_what_fails_is_one_line_with_the_url(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RemoteFolder(f"local://{tmp_path}/file/run")
    for work in (
        lambda: folder.write(b"", "a"),
        lambda: folder.put(tmp_path / "file", "deep/a"),
        lambda: folder.delete_folder("deep"),
    ):
        with pytest.raises(StorageError) as error:
            work()
        assert f"local://{tmp_path}/file/run" in str(error.value) and "\n" not in str(error.value)
    for url in ("s3://key:secret@bucket/run", "s3://bucket/run?access_key=secret"):
        with pytest.raises(InputError, match="must not hold credentials") as refused:
            located(url)
        assert "secret" not in str(refused.value).replace("AWS_SECRET_ACCESS_KEY", "")
    with pytest.raises(InputError, match="unknown scheme 's33'"):
        located("s33://bucket/run")


def test_an_output_is_brought_to_its_url_or_kept(tmp_path: Path) -> None:
    base = f"memory://{uuid.uuid4().hex}"
    check_output(f"{base}/out/a.json")
    with delivered(f"{base}/out/a.json") as path:
        path.write_text("content")
    assert RemoteFolder(f"{base}/out").read("a.json") == b"content" and not path.parent.exists()
    with delivered(f"{base}/vectors") as path:
        (path / "users").mkdir(parents=True)
        (path / "users/part").write_text("1")
        (path / "export.json").write_text("{}")
    check_folder(f"{base}/vectors", "export.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/export.json").write_text("new")
    deliver(tmp_path / "other", f"{base}/vectors")
    assert RemoteFolder(f"{base}/vectors").files("") == ["export.json"]
    with pytest.raises(InputError, match=r"is not empty and has no export\.json; choose another"):
        check_folder(f"{base}/out", "export.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="what was made is kept in") as error, delivered(f"local://{tmp_path}/file/a.json") as path:
        path.write_text("dear")
    assert path.read_text() == "dear" and str(path) in str(error.value)
    with delivered(str(tmp_path / "b.json")) as path:
        assert path == tmp_path / "b.json"


def test_where_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert located("runs/first") == (Path("runs/first"), None)
    assert located(f"file://{tmp_path}/run") == (tmp_path / "run", None)
    assert local_path(f"file://{tmp_path}/run") == tmp_path / "run" and not is_remote(f"file://{tmp_path}")
    copies = [located(f"memory://{name}")[0] for name in ("b/run", "b/run/", "c/run", "b/ru:n")]
    assert copies[0] == copies[1] and len(set(copies)) == 3 and all(copy.is_relative_to(tmp_path / "runs") for copy in copies)
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert located("memory://b/run")[0].is_relative_to(tmp_path / "xdg/triptych/runs")


def test_committed_steps_are_those_with_a_manifest() -> None:
    base = f"memory://{uuid.uuid4().hex}/run"
    files = fsspec.filesystem("memory")
    assert RunAtUrl(base).steps() == []
    for name in (
        "step_10/manifest.json",
        "step_9/manifest.json",
        "step_11/rank_0.0.safetensors",
        "step_8.damaged/manifest.json",
        "x/manifest.json",
    ):
        files.pipe(f"{base}/checkpoints/{name}", b"{}")
    run = RunAtUrl(base)
    assert run.steps() == [9, 10]
    assert run.chosen_step([9, 10]) == 10
    files.pipe(f"{base}/result.json", b'{"step": 9}')
    assert run.chosen_step([9, 10]) == 9


@pytest.mark.parametrize("result", [b"", b"{", b"[]", b"{}", b'{"step": 9}', b'{"step": "10"}', b'{"step": [10]}'])
def test_without_a_best_step_that_is_there_the_newest_is_chosen(result: bytes) -> None:
    assert chosen_step([8, 10], result) == 10
