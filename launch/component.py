"""TorchX components: torchx run -s SCHEDULER launch/component.py:train --recipe R --run DIR --nodes 2 --ranks 8

TorchX executes this file outside the package, so it imports nothing of ours. It reads the functions' annotations and docstrings for
`torchx run ... --help`, so each function names all its arguments.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.components.dist import ddp

ENVIRONMENT = {
    # Seconds from SIGTERM to SIGKILL, 30 unless given: too few for ranks that save a large checkpoint.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Of torchrun and the ranks, where neither `env` nor the environment of this command say otherwise."""
PORT = 29500
"""Where nodes meet, unless the user or the job's number say otherwise."""


def train(
    recipe: str,
    run: str,
    set: str = "",
    resume: str = "false",
    nodes: int = 1,
    ranks: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    h: Optional[str] = None,
    image: str = "",
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    restarts: int = 0,
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Train a recipe over nodes x ranks processes.

    Args:
        recipe: recipe file as every node sees it, or the name of a bundled one
        run: run folder, on storage that every node sees, or a URL
        set: overrides, key=value, separated by semicolons
        resume: true to go on from the last checkpoint of the run; a job that its scheduler starts anew does so by itself
        nodes: number of nodes
        ranks: processes a node; one a GPU
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource, instead of cpu, gpu and memMB
        image: image, for schedulers that run one
        mounts: into the image, one after the other: type=bind,src=PATH,dst=PATH[,readonly] or type=volume,src=NAME,dst=PATH
        env: environment variables, A=1,B=2
        max_retries: how often the scheduler may start the job anew; it goes on from the last checkpoint. Kubernetes counts the first start
        restarts: how often torchrun may start the ranks again within the job, from the last checkpoint
        rdzv_port: port of the first node where nodes meet; 29500, and on Slurm one of this job, unless given
    """
    stage = _train(recipe, run, set, resume)
    env = {"PET_MAX_RESTARTS": str(restarts), **(env or {})}  # as torchrun --max-restarts
    return _job("train", [stage], nodes, ranks, cpu, gpu, memMB, h, image, mounts, env, max_retries, rdzv_port)


def evaluate(
    run: str, data: str, json: str = "", nodes: int = 1, ranks: int = 1, cpu: int = 2, gpu: int = 0, memMB: int = 4096,
    h: Optional[str] = None, image: str = "", mounts: Optional[List[str]] = None, env: Optional[Dict[str, str]] = None,
    max_retries: int = 0, rdzv_port: int = 0,
) -> specs.AppDef:  # fmt: skip
    """Metrics of a run on data with labels.

    Args:
        run: run folder
        data: parquet file, folder or glob; or one relative to the recipe's data.root
        json: where to write the metrics
        nodes: number of nodes
        ranks: processes a node
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource, instead of cpu, gpu and memMB
        image: image, for schedulers that run one
        mounts: as of train
        env: environment variables, A=1,B=2
        max_retries: how often the scheduler may start the job anew
        rdzv_port: port of the first node where nodes meet; 29500, and on Slurm one of this job, unless given
    """
    return _job("evaluate", [_evaluate(run, data, json)], nodes, ranks, cpu, gpu, memMB, h, image, mounts, env, max_retries, rdzv_port)


def predict(
    run: str, data: str, out: str, nodes: int = 1, ranks: int = 1, cpu: int = 2, gpu: int = 0, memMB: int = 4096,
    h: Optional[str] = None, image: str = "", mounts: Optional[List[str]] = None, env: Optional[Dict[str, str]] = None,
    max_retries: int = 0, rdzv_port: int = 0,
) -> specs.AppDef:  # fmt: skip
    """Predictions of a run, one column a task, in input row order.

    Args:
        run: run folder
        data: parquet file, folder or glob; or one relative to the recipe's data.root
        out: parquet file to write
        nodes: number of nodes
        ranks: processes a node
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource, instead of cpu, gpu and memMB
        image: image, for schedulers that run one
        mounts: as of train
        env: environment variables, A=1,B=2
        max_retries: how often the scheduler may start the job anew
        rdzv_port: port of the first node where nodes meet; 29500, and on Slurm one of this job, unless given
    """
    stage = ["predict", "--run-dir", run, "--data", data, "--out", out]
    return _job("predict", [stage], nodes, ranks, cpu, gpu, memMB, h, image, mounts, env, max_retries, rdzv_port)


def export(
    run: str, out: str, nodes: int = 1, ranks: int = 1, cpu: int = 2, gpu: int = 0, memMB: int = 4096,
    h: Optional[str] = None, image: str = "", mounts: Optional[List[str]] = None, env: Optional[Dict[str, str]] = None,
    max_retries: int = 0, rdzv_port: int = 0,
) -> specs.AppDef:  # fmt: skip
    """User and item vectors of a run, and a retrieval index.

    Args:
        run: run folder
        out: folder to write
        nodes: number of nodes
        ranks: processes a node
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource, instead of cpu, gpu and memMB
        image: image, for schedulers that run one
        mounts: as of train
        env: environment variables, A=1,B=2
        max_retries: how often the scheduler may start the job anew
        rdzv_port: port of the first node where nodes meet; 29500, and on Slurm one of this job, unless given
    """
    return _job("export", [_export(run, out)], nodes, ranks, cpu, gpu, memMB, h, image, mounts, env, max_retries, rdzv_port)


def pipeline(
    recipe: str,
    run: str,
    data: str,
    json: str = "",
    out: str = "",
    prepare: str = "",
    source: str = "",
    prepared: str = "",
    set: str = "",
    resume: str = "false",
    nodes: int = 1,
    ranks: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    h: Optional[str] = None,
    image: str = "",
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    restarts: int = 0,
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Prepare, train, evaluate and export in one job: stage after stage on the same nodes.

    Args:
        recipe: recipe file as every node sees it, or the name of a bundled one
        run: run folder, on storage that every node sees, or a URL
        data: rows with labels to evaluate on: parquet file, folder or glob; or one relative to the recipe's data.root
        json: where to write the metrics
        out: folder for vectors and index; nothing is exported unless given
        prepare: name of a public log to prepare first, as of `triptych prepare`; its recipe then reads from `prepared`
        source: its raw files
        prepared: folder for what is prepared; files prepared before stay
        set: overrides, key=value, separated by semicolons
        resume: true to go on from the last checkpoint of the run; a job that its scheduler starts anew does so by itself
        nodes: number of nodes
        ranks: processes a node; one a GPU
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource, instead of cpu, gpu and memMB
        image: image, for schedulers that run one
        mounts: as of train
        env: environment variables, A=1,B=2
        max_retries: how often the scheduler may start the job anew
        restarts: how often torchrun may start the ranks of a stage again within the job
        rdzv_port: port of the first node where nodes meet, of the first stage; 29500, and on Slurm one of this job, unless given
    """
    if bool(prepare) != bool(source) or bool(prepare) != bool(prepared):
        raise ValueError("prepare, source and prepared go together: give all three or none")
    stages = []
    if prepare:
        stages.append(["prepare", prepare, "--source", source, "--out", prepared])
        set = ";".join([f"data.root={prepared}", set])
    stages += [[*_train(recipe, run, set, resume), "--evaluates-later", data], _evaluate(run, data, json)]
    if out:
        stages.append(_export(run, out))
    env = {"PET_MAX_RESTARTS": str(restarts), **(env or {})}
    return _job("pipeline", stages, nodes, ranks, cpu, gpu, memMB, h, image, mounts, env, max_retries, rdzv_port)


# Of each stage, the module and its arguments. --run-dir, not --run: torchrun would take that for its own --run-path.


def _train(recipe: str, run: str, set: str, resume: str) -> List[str]:
    if resume.lower() not in ("true", "false"):
        raise ValueError(f"resume: true or false, not {resume}")
    overrides = [part for override in set.split(";") if override for part in ("--set", override)]
    return ["train", "--recipe", recipe, "--run-dir", run, *overrides, *(["--resume"] if resume.lower() == "true" else [])]


def _evaluate(run: str, data: str, json: str) -> List[str]:
    return ["evaluate", "--run-dir", run, "--data", data, *(["--json", json] if json else [])]


def _export(run: str, out: str) -> List[str]:
    return ["export", "--run-dir", run, "--out", out]


def _job(
    name: str, stages: List[List[str]], nodes: int, ranks: int, cpu: int, gpu: int, memMB: int, h: Optional[str], image: str,
    mounts: Optional[List[str]], env: Optional[Dict[str, str]], max_retries: int, rdzv_port: int,
) -> specs.AppDef:  # fmt: skip
    """One role that runs the stages one after the other, each on all its nodes.

    TorchX starts the roles of a job together: with a role a stage, three of four would hold nodes only to wait.
    """
    if min(nodes, ranks) < 1:
        raise ValueError(f"nodes and ranks are at least 1, not {nodes} and {ranks}")
    port = rdzv_port or PORT
    env = {**{name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}, **_revision(), **(env or {})}
    jobs = [
        # A store may outlive its stage on another node by a moment: the next stage meets elsewhere.
        ddp(
            # $$: TorchX puts values of its own in place of ${...}.
            *(arg.replace("$", "$$") for arg in args), m=f"triptych.launch.{module}", name=f"triptych/{name}", j=f"{nodes}x{ranks}",
            cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image or ".", env=dict(env), max_retries=max_retries, rdzv_port=port + number,
            mounts=mounts,
        )
        for number, (module, *args) in enumerate(stages)
    ]  # fmt: skip
    role = jobs[0].roles[0]
    own_port = "" if rdzv_port else "--port-of-job "
    commands = [own_port + job.roles[0].args[1].removeprefix("torchrun ") for job in jobs]
    # This environment need not be active where the job starts. An image has its own.
    path = "" if image else f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    launcher = "node" if len(commands) == 1 else "pipeline"
    # exec: signals of the scheduler go to the first process, and a shell would keep them to itself.
    role.args[1] = f"{path}exec python -m triptych.launch.{launcher} {' --then '.join(commands)}"
    role.name = name
    role.port_map = {f"c10d-{number}" if number else "c10d": port + number for number in range(len(jobs))}
    jobs[0].name = name
    return jobs[0]


def _revision() -> Dict[str, str]:
    """Of the checkout where the job is started: what runs may be a copy of it without history."""
    if not Path("launch/component.py").is_file():  # __file__ is not this file's here
        return {}
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return {}
    return {"TRIPTYCH_REVISION": described.stdout.strip()}
