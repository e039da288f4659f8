"""Jobs of Slurm meet at a port of their own."""

from __future__ import annotations

import pytest

from triptych.launch.nodes.slurm import PORT_OF_JOB, with_port_of_job


def args(endpoint: str, job: str, *before: str) -> list[str]:
    return [*before, "--rdzv_endpoint", endpoint, "--rdzv_id", job, "--nnodes", "2", "-m", "triptych.launch.train"]


class TestPort:
    def test_jobs_of_slurm_have_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "5")  # of this node's part; the job's is the same on all
        assert with_port_of_job(args("n1:29500", "4", PORT_OF_JOB)) == args("n1:20040", "4")
        assert with_port_of_job(args("n1:29503", "4", PORT_OF_JOB)) == args("n1:20043", "4")
        found = {with_port_of_job(args(f"n1:{29500 + stage}", str(job), PORT_OF_JOB))[1] for job in range(70, 1070) for stage in range(4)}
        assert len(found) == 4000 and all(20000 <= int(endpoint[3:]) < 30000 for endpoint in found)

    def test_others_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert with_port_of_job(args("n1:29500", "4", PORT_OF_JOB)) == args("n1:29500", "4")
        monkeypatch.setenv("SLURM_JOB_ID", "4")
        assert with_port_of_job(args("n1:29500", "4")) == args("n1:29500", "4")
        assert with_port_of_job(args("localhost:0", "4", PORT_OF_JOB)) == args("localhost:0", "4")
        assert with_port_of_job(args("n1:29500", "train-x", PORT_OF_JOB)) == args("n1:29500", "train-x")
