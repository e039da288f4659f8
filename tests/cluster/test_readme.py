"""The README's commands for a laptop and for Slurm, as they are printed there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster.jobs import Job
from tests.cluster.slurm import Slurm
from tests.small import write_log

ROOT = Path(__file__).parents[2]


def commands(begin: str, shared: Path) -> list[str]:
    """Of the README's block that follows a text."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition(begin)[2].partition("```bash\n")[2].partition("```")[0]
    lines = block.replace("/shared", str(shared)).splitlines()
    assert len(lines) == 3, lines
    return lines


def test_from_laptop_to_slurm(slurm: Slurm, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    write_log(shared).rename(shared / "shop.toml")
    for command in commands("On a laptop:", shared):
        subprocess.run(command, shell=True, check=True, cwd=ROOT, env=slurm.env, timeout=180)
    for number, command in enumerate(commands("On Slurm,", shared), 1):
        printed = slurm.head.run("bash", "-c", f"cd {ROOT} && {command}", env=slurm.env, timeout=180)
        Job(slurm, shared / f"job-{number}", printed.strip().splitlines()[-1]).succeeds()
    laptop, cluster = (json.loads((shared / name).read_text()) for name in ("laptop.json", "run.json"))
    assert cluster["tasks"]["ctr"]["auc"] == pytest.approx(laptop["tasks"]["ctr"]["auc"], rel=1e-5)
    assert sorted(path.name for path in (shared / "run_vectors").iterdir()) == sorted(
        path.name for path in (shared / "laptop_vectors").iterdir()
    )
