"""TorchX components: torchx run -s SCHEDULER launch/component.py:train -- --recipe R --run DIR --nodes 2 --ranks 8

TorchX executes this file outside the package, so it imports nothing of ours.
"""

import os
from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.components.dist import ddp

ENVIRONMENT = {
    # Seconds from SIGTERM to SIGKILL, 30 unless given: too few for ranks that save a large checkpoint.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Of torchrun and the ranks, where neither `env` nor the environment of this command say otherwise."""


def train(
    recipe: str,
    run: str,
    set: str = "",
    resume: bool = False,
    nodes: int = 1,
    ranks: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    h: Optional[str] = None,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Train a recipe over nodes x ranks processes.

    Args:
        recipe: recipe file, as every node sees it
        run: run folder, on storage that every node sees
        set: overrides, key=value, separated by semicolons
        resume: go on from the last checkpoint of the run
        nodes: number of nodes
        ranks: processes a node; one a GPU
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource, instead of cpu, gpu and memMB
        image: image, for schedulers that run one
        env: environment variables, A=1,B=2
        max_retries: how often the scheduler may restart the job
        restarts: how often torchrun may start the ranks again when one fails or is killed, from the last checkpoint
        rdzv_port: port of the first node where ranks meet
    """
    args = ["--recipe", recipe, "--run-dir", run, *(part for override in set.split(";") if override for part in ("--set", override))]
    resume = resume or max_retries > 0  # a restarted job finds its own checkpoints
    env = {"PET_MAX_RESTARTS": str(restarts), **(env or {})}  # as torchrun --max-restarts
    return _ranks("train", args + (["--resume"] if resume else []), nodes, ranks, cpu, gpu, memMB, h, image, env, max_retries, rdzv_port)


def evaluate(
    run: str, data: str, json: str = "", nodes: int = 1, ranks: int = 1, cpu: int = 2, gpu: int = 0, memMB: int = 4096,
    h: Optional[str] = None, image: str = "", env: Optional[Dict[str, str]] = None, max_retries: int = 0, rdzv_port: int = 29500,
) -> specs.AppDef:  # fmt: skip
    """Metrics of a run on data with labels.

    Args:
        run: run folder
        data: parquet file, folder or glob
        json: where to write the metrics
        nodes: number of nodes
        ranks: processes a node
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource
        image: image
        env: environment variables
        max_retries: restarts
        rdzv_port: port of the first node
    """
    args = ["--run-dir", run, "--data", data] + (["--json", json] if json else [])
    return _ranks("evaluate", args, nodes, ranks, cpu, gpu, memMB, h, image, env, max_retries, rdzv_port)


def predict(
    run: str, data: str, out: str, nodes: int = 1, ranks: int = 1, cpu: int = 2, gpu: int = 0, memMB: int = 4096,
    h: Optional[str] = None, image: str = "", env: Optional[Dict[str, str]] = None, max_retries: int = 0, rdzv_port: int = 29500,
) -> specs.AppDef:  # fmt: skip
    """Predictions of a run, one column a task, in input row order.

    Args:
        run: run folder
        data: parquet file, folder or glob
        out: parquet file to write
        nodes: number of nodes
        ranks: processes a node
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node, in MB
        h: named resource
        image: image
        env: environment variables
        max_retries: restarts
        rdzv_port: port of the first node
    """
    return _ranks(
        "predict", ["--run-dir", run, "--data", data, "--out", out], nodes, ranks, cpu, gpu, memMB, h, image, env, max_retries, rdzv_port
    )


def export(
    run: str, out: str, nodes: int = 1, ranks: int = 1, cpu: int = 2, gpu: int = 0, memMB: int = 4096,
    h: Optional[str] = None, image: str = "", env: Optional[Dict[str, str]] = None, max_retries: int = 0, rdzv_port: int = 29500,
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
        h: named resource
        image: image
        env: environment variables
        max_retries: restarts
        rdzv_port: port of the first node
    """
    return _ranks("export", ["--run-dir", run, "--out", out], nodes, ranks, cpu, gpu, memMB, h, image, env, max_retries, rdzv_port)


def _ranks(
    command: str, args: List[str], nodes: int, ranks: int, cpu: int, gpu: int, memMB: int, h: Optional[str], image: str,
    env: Optional[Dict[str, str]], max_retries: int, rdzv_port: int,
) -> specs.AppDef:  # fmt: skip
    env = {**{name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}, **(env or {})}
    # --run-dir, not --run: torchrun would take that for its own --run-path.
    return ddp(
        *args, m=f"triptych.launch.{command}", name=f"triptych/{command}", j=f"{nodes}x{ranks}", cpu=cpu, gpu=gpu, memMB=memMB, h=h,
        image=image or ".", env=env, max_retries=max_retries, rdzv_port=rdzv_port,
    )  # fmt: skip
