"""The launcher's small parts: advice on versions that fits when followed, records that survive kills, progress lines that read back."""

import io
import itertools
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from triptych.launch import console, stack
from triptych.launch.console import PROGRESS, ProgressLines, summary
from triptych.launch.records import Records
from triptych.launch.stack import mismatch
from triptych.launch.writing import write_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TRIOS = {"2.13": "1.8", "2.12": "1.7", "2.11": "1.6"}
"""torch -> torchrec and FBGEMM, as released together."""
BUILDS = ["cpu", "cuda"]
PATCHES = [".0", ".1", ".0+cpu", ".0+cu128", ".0.dev20260101+cpu"]
PACKAGE = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}


def found(torch, torchrec, fbgemm, build):
    return mismatch(torch, torchrec, fbgemm if build == "cpu" else None, fbgemm if build == "cuda" else None)


def after_following(message, torch):
    """What `mismatch` says once the message's pip command was run."""
    packages = dict(package.split("==") for package in re.search(r"pip install --no-deps (\S+==\S+(?: \S+==\S+)*)", message)[1].split())
    assert packages.keys() <= {"torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"}
    return mismatch(torch, packages.get("torchrec"), packages.get("fbgemm-gpu-cpu"), packages.get("fbgemm-gpu"))


@pytest.mark.parametrize("torch, wanted", TRIOS.items())
class TestMismatch:
    @pytest.mark.parametrize("build", BUILDS)
    def test_what_fits_and_what_to_install_instead(self, torch, wanted, build):
        install = f"pip install --no-deps {PACKAGE[build]}=={wanted}.0 torchrec=={wanted}.0"
        others = [*sorted(set(TRIOS.values())), "1.9", "0.8"]
        for torchrec, fbgemm, patch in itertools.product(others, others, PATCHES):
            message = found(torch + patch, torchrec + patch, fbgemm + patch, build)
            if torchrec == fbgemm == wanted:
                assert message is None
                continue
            package, version = (PACKAGE[build], fbgemm) if fbgemm != wanted else ("torchrec", torchrec)
            assert message == f"torch {torch}{patch} needs {package} {wanted}.x, found {version}{patch}; run: {install}"
            assert after_following(message, torch + patch) is None

    @pytest.mark.parametrize("cpu, cuda", [("1.8.0", "1.8.0"), ("1.8.0+cpu", "1.7.0"), ("1.6.0", "1.8.0")])
    def test_both_builds(self, torch, wanted, cpu, cuda):
        message = mismatch(f"{torch}.0+cpu", f"{wanted}.0", cpu, cuda)
        assert message.startswith("fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other; uninstall both, then: pip ")
        fbgemm = [version for _, version in re.findall(r"(fbgemm-gpu|fbgemm-gpu-cpu)==([\d.]+)", message)]
        assert fbgemm == [f"{wanted}.0"] * 2
        for build in BUILDS:
            assert found(f"{torch}.0+cpu", f"{wanted}.0", fbgemm[0], build) is None


class TestNothingToFit:
    @pytest.mark.parametrize(
        "versions, missing",
        [
            ((None, "1.8.0", "1.8.0", None), "torch"),
            (("2.13.0", None, None, "1.8.0"), "torchrec"),
            (("2.13.0", "1.8.0", None, None), "fbgemm-gpu-cpu"),
            ((None, None, None, None), "torch, torchrec, fbgemm-gpu-cpu"),
            (("2.5.0", None, "1.8.0", "1.8.0"), "torchrec"),
        ],
    )
    def test_missing(self, versions, missing):
        assert mismatch(*versions) == f"not installed: {missing}; run 'make install', or 'make install DEVICE=cuda' on a GPU machine"

    @pytest.mark.parametrize("torch", ["2.10.0", "2.1.3+cpu", "2.130.0", "3.0.0", "1.13.1"])
    @pytest.mark.parametrize("release", TRIOS.values())
    def test_unsupported_torch(self, torch, release):
        message = found(torch, f"{release}.0", f"{release}.0", "cpu")
        assert message.startswith(f"torch {torch} is not supported; install one of torch ")
        assert dict(re.findall(r"([\d.]+) with torchrec ([\d.]+)", message)) == TRIOS


class TestCheck:
    def test_the_installed_stack_fits(self):
        assert stack.check() is None

    def test_both_builds_end_in_one_line(self, tmp_path, monkeypatch):
        """Metadata of the other build, as pip would leave it, is found beside the installed one."""
        other = PACKAGE["cpu" if stack.has_cuda_kernels() else "cuda"]
        metadata = tmp_path / f"{other.replace('-', '_')}-1.8.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {other}\nVersion: 1.8.0\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        assert stack.has_cuda_kernels()
        with pytest.raises(SystemExit, match=r"^triptych: fbgemm-gpu and fbgemm-gpu-cpu are both installed") as ended:
            stack.check()
        assert "\n" not in str(ended.value)

    def test_pins_of_makefile_and_pyproject_fit(self):
        pins = dict(re.findall(r"^\w+ *:= *([\w-]+)==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert pins.keys() == {"torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"}
        assert mismatch(pins["torch"], pins["torchrec"], pins["fbgemm-gpu-cpu"], None) is None
        assert mismatch(pins["torch"], pins["torchrec"], None, pins["fbgemm-gpu"]) is None
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert f"torch=={pins['torch']}" in project["dependencies"]
        named = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
        assert not {"torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"} & set(named)


def loss_record(step, loss):
    return {"step": step, "epoch": 0, "rows_per_second": 7.5, "loss": {"ctr": loss}}


def scalars(run, tag):
    """(step, value) of a TensorBoard curve."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class TestRecords:
    def test_resuming_drops_later_steps_and_half_a_line(self, tmp_path):
        first = Records(tmp_path, 0)
        for step in (1, 2, 3, 4):
            first.write(loss_record(step, step / 2))
        first.board.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "epo')
        resumed = Records(tmp_path, 2)
        assert lines(tmp_path) == [loss_record(1, 0.5), loss_record(2, 1.0)]
        resumed.write(loss_record(3, 30.0))
        resumed.board.close()
        assert lines(tmp_path) == [loss_record(1, 0.5), loss_record(2, 1.0), loss_record(3, 30.0)]
        assert scalars(tmp_path, "train/loss/ctr") == [(1, 0.5), (2, 1.0), (3, 30.0)]

    def test_a_run_from_the_beginning_keeps_nothing(self, tmp_path):
        for loss in (1.0, 2.0):
            records = Records(tmp_path, 0)
            records.write(loss_record(1, loss))
            records.board.close()
        assert lines(tmp_path) == [loss_record(1, 2.0)]
        assert scalars(tmp_path, "train/loss/ctr") == [(1, 2.0)]

    def test_numbers_become_curves_under_their_split(self, tmp_path):
        records = Records(tmp_path, 0)
        report = {"split": "valid", "rows": 9, "step": 3, "tasks": {"ctr": {"kind": "binary", "auc": 0.75, "gauc": None}}}
        records.write(report)
        records.write(loss_record(3, 0.5))
        records.board.close()
        assert lines(tmp_path) == [report, loss_record(3, 0.5)]
        curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
        assert sorted(curves) == ["train/loss/ctr", "train/rows_per_second", "valid/tasks/ctr/auc"]
        assert scalars(tmp_path, "valid/tasks/ctr/auc") == [(3, 0.75)]

    def test_json_is_replaced_whole(self, tmp_path):
        path = tmp_path / "result.json"
        write_json(path, {"step": 1})
        with pytest.raises(TypeError):
            write_json(path, {"step": object()})
        assert json.loads(path.read_text()) == {"step": 1}
        write_json(path, {"step": 2})
        assert json.loads(path.read_text()) == {"step": 2} and [p.name for p in tmp_path.iterdir()] == ["result.json"]


class TestProgress:
    words = st.text("abc:,./ 123", max_size=9).map(lambda text: " ".join(text.split()))

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 10**9), words)
    def test_a_line_reads_back(self, total, note):
        log = io.BytesIO()
        with redirect_stdout(io.TextIOWrapper(log, "utf-8", newline="\n")):
            ProgressLines("train", enabled=True)(total, total, note)
            line, rest = log.getvalue().decode().split("\n")  # there at once: it was flushed
        read = PROGRESS.match(line)
        assert rest == ""
        assert (read["stage"], int(read["done"]), int(read["total"]), read["note"] or "") == ("train", total, total, note)

    def test_one_line_every_two_seconds_and_the_last(self, monkeypatch, capsys):
        for enabled in (True, False):
            progress = ProgressLines("train", enabled)
            for done, now in enumerate([100.0, 100.1, 101.9, 102.0, 102.5, 103.9, 104.1, 104.2], 1):
                monkeypatch.setattr(console.time, "monotonic", lambda now=now: now)
                progress(done, 8)
            assert capsys.readouterr().out == ("train 1/8\ntrain 4/8\ntrain 7/8\ntrain 8/8\n" if enabled else "")

    def test_summary(self):
        tasks = {
            "ctr": {"kind": "binary", "auc": 0.73581},
            "cvr": {"kind": "binary", "auc": None},
            "dwell": {"kind": "duration", "mae": 18.7},
        }
        assert summary({"tasks": tasks}) == "ctr auc 0.7358, cvr auc n/a, dwell mae 18.7000"
