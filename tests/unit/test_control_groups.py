"""What control groups leave to a process, in either version, and where the path is the host's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triptych.embeddings.control_groups import memory_limits, num_cores


@pytest.fixture
def process(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("a/b", "memory/x", "cpu/x"):
        (tmp_path / "fs" / folder).mkdir(parents=True)
    return tmp_path / "fs"


def test_memory(process: Path, root: Path, tmp_path: Path) -> None:
    (root / "memory.max").write_text("max\n")
    (root / "a/memory.max").write_text("5000\n")
    (root / "a/b/memory.max").write_text("7000\n")
    (root / "memory/memory.limit_in_bytes").write_text("9000\n")
    process.write_text("0::/a/b\n")
    assert sorted(group.limit for group in memory_limits(process, root)) == [5000, 7000]
    process.write_text("12:cpu,cpuacct:/x\n4:memory:/not/here\n")
    assert [group.limit for group in memory_limits(process, root)] == [9000]
    assert list(memory_limits(tmp_path / "none", root)) == []


def test_cores(process: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    process.write_text("0::/a/b\n")
    assert num_cores(process, root) == 64
    (root / "cpu.max").write_text("max 100000\n")
    (root / "a/cpu.max").write_text("250000 100000\n")
    assert num_cores(process, root) == 3
    (root / "a/b/cpu.max").write_text("10000 100000\n")
    assert num_cores(process, root) == 1
    process.write_text("3:cpu,cpuacct:/x\n")
    (root / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (root / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert num_cores(process, root) == 64
    (root / "cpu/x/cpu.cfs_quota_us").write_text("400000\n")
    (root / "cpu/x/cpu.cfs_period_us").write_text("100000\n")
    assert num_cores(process, root) == 4
