"""A run on S3 through the command line: trained, killed, resumed from another folder, evaluated, predicted with and exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest

from tests.command import ROOT, refused, succeeds, triptych
from tests.faults.campaign import assert_equal_runs
from tests.s3_server import BUCKET, ENVIRONMENT, client, free_port, serve_s3, use
from tests.small import write_log
from triptych.launch.nodes.mirror import CACHE

RUN = f"s3://{BUCKET}/runs/first"
SETTINGS = [part for value in ("checkpoint.every_steps=3", "checkpoint.keep=2", "train.epochs=4") for part in ("--set", value)]
SECONDS = 120


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), train_rows=2000)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with serve_s3() as port:
        yield port


@pytest.fixture
def s3(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fs.FileSystem:
    use(monkeypatch, server)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return client(server)


def names(s3: fs.FileSystem, prefix: str) -> list[str]:
    found = s3.get_file_info(fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{BUCKET}/{prefix}/") for info in found if info.is_file)


def download(s3: fs.FileSystem, prefix: str, folder: Path) -> Path:
    for name in names(s3, prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(s3.open_input_file(f"{BUCKET}/{prefix}/{name}").read())
    return folder


def ranks_below(pid: int) -> list[int]:
    """The ranks that a command started."""
    text = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in text.splitlines()]
    parents, words = {int(row[0]): int(row[1]) for row in rows}, {int(row[0]): row[2] for row in rows}
    below = [pid]
    for ancestor in below:
        below += [child for child, parent in parents.items() if parent == ancestor]
    return [
        child
        for child in below
        if "triptych.launch.train" in words.get(child, "") and "torch" not in words[child].partition("-m")[2].split()[0]
    ]


def killed(command: list[str], s3: fs.FileSystem, *, first: bool) -> str:
    """Start a training, kill a rank when two checkpoints are there, or all of them; what it said."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        deadline = time.monotonic() + SECONDS
        while sum(name.endswith("manifest.json") for name in names(s3, "runs/first/checkpoints")) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
            time.sleep(0.05)
        ranks = ranks_below(process.pid)
        assert len(ranks) == 2, ranks
        for rank in ranks[:1] if first else ranks:
            os.kill(rank, signal.SIGKILL)
        return process.communicate(timeout=SECONDS)[0]


@pytest.mark.long
def test_a_run_on_s3_equals_one_on_disk_through_kills(
    s3: fs.FileSystem, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", "--recipe", str(log), "--ranks", "2", *SETTINGS]
    succeeds(*train, "--run", tmp_path / "disk")
    command = [sys.executable, "-m", "triptych.launch.cli", *train, "--run", RUN]
    said = killed([*command, "--restarts", "1"], s3, first=True)
    assert f"resumed from {RUN}/checkpoints/step_" in said and f"{RUN}/result.json" in said, said
    assert_equal_runs(download(s3, "runs/first", tmp_path / "restarted"), tmp_path / "disk")
    assert (
        refused(triptych(*train, "--run", RUN))
        == f"triptych: {RUN} already holds a trained run; add --resume to go on with it, or choose another --run\n"
    )

    s3.delete_dir(f"{BUCKET}/runs/first")
    said = killed(command, s3, first=False)  # what the deleted run left in this cache is of no use
    assert "resumed" not in said and "was killed by signal 9" in said, said
    monkeypatch.setenv(CACHE, str(tmp_path / "another"))
    said = succeeds(*train, "--run", RUN, "--resume")
    assert f"resumed from {RUN}/checkpoints/step_" in said
    run = download(s3, "runs/first", tmp_path / "resumed")
    assert_equal_runs(run, tmp_path / "disk")
    succeeds("evaluate", "--run", RUN, "--data", "valid.parquet", "--json", f"s3://{BUCKET}/out/first.json")
    evaluated, result = json.loads(s3.open_input_file(f"{BUCKET}/out/first.json").read()), json.loads((run / "result.json").read_text())
    assert evaluated["step"] == result["step"] and evaluated["rows"] == result["rows"]
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, tmp_path / "disk")]
    assert kept[0] == kept[1]


@pytest.mark.long
def test_the_other_commands(s3: fs.FileSystem, log: Path, tmp_path: Path) -> None:
    succeeds("train", "--recipe", log, "--run", f"s3://{BUCKET}/runs/second")
    download(s3, "runs/second", tmp_path / "second")
    runs, out = {"disk": tmp_path / "second", "s3": f"s3://{BUCKET}/runs/second"}, f"s3://{BUCKET}/out"
    for name, run in runs.items():
        place: dict[str, object] = {"disk": tmp_path / "out", "s3": out}
        succeeds("evaluate", "--run", run, "--data", "valid.parquet", "--json", f"{place[name]}/valid.json")
        succeeds("predict", "--run", run, "--data", log.parent / "valid.parquet", "--out", f"{place[name]}/valid.parquet", "--ranks", 2)
        succeeds("export", "--run", run, "--out", f"{place[name]}/vectors", "--ranks", 2)
    found = download(s3, "out", tmp_path / "found")
    assert json.loads((found / "valid.json").read_text()) == json.loads((tmp_path / "out/valid.json").read_text())
    assert pq.read_table(found / "valid.parquet").equals(pq.read_table(tmp_path / "out/valid.parquet"))
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (found, tmp_path / "out")]
    assert files[0] == files[1] and "vectors/items.faiss" in files[0]
    for name in ("items.faiss", "export.json"):
        assert (found / "vectors" / name).read_bytes() == (tmp_path / "out/vectors" / name).read_bytes()


def test_what_is_not_there_or_refuses(s3: fs.FileSystem, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(triptych("evaluate", "--run", f"s3://{BUCKET}/nothing", "--data", "valid.parquet"))
    assert (
        said
        == f"triptych: s3://{BUCKET}/nothing: no run there (no recipe.toml); train one with: triptych train --run s3://{BUCKET}/nothing\n"
    )
    said = refused(triptych("train", "--recipe", log, "--run", "s3://nothing/run"))
    assert "s3://nothing/run" in said and "no such bucket: s3://nothing" in said
    with serve_s3(denies=True) as port:
        use(monkeypatch, port)
        said = refused(triptych("train", "--recipe", log, "--run", RUN))
        assert f"{RUN}/checkpoints: access denied; check the credentials" in said and ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in said
    use(monkeypatch, free_port())
    done = triptych("train", "--recipe", log, "--run", RUN)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"triptych: {RUN}/checkpoints: no connection ("), done.stderr
