"""The request for Kubernetes, a Volcano job: every field that a run needs, and the published schemas of its objects."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

from tests.torchx_request import IMAGE, ROOT, request
from tests.volcano_schema import LABEL, VALIDATOR, host_of, host_variable

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Role \w+ configured with restarts")  # on every request that has retries

RECIPE, RUN = "/mnt/recipes/clicks.toml", "/mnt/runs/it's one"
COMPONENTS: dict[str, tuple[str, ...]] = {
    "train": ("--recipe", RECIPE, "--run", RUN, "--set", "train.lr=0.01;train.epochs=2"),
    "evaluate": ("--run", RUN, "--data", "/mnt/data/test*.parquet", "--json", "/mnt/metrics.json"),
    "predict": ("--run", RUN, "--data", "/mnt/data", "--out", "/mnt/predicted.parquet"),
    "export": ("--run", RUN, "--out", "/mnt/vectors"),
    "pipeline": ("--recipe", RECIPE, "--run", RUN, "--data", "test", "--out", "/mnt/vectors"),
}
CLUSTER = ("--image", IMAGE, "--nodes", 2, "--ranks", 8, "--cpu", 16, "--gpu", 8, "--memMB", 65536)
QUANTITY = re.compile(r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi)?$")
VERSIONS = ("1.25", kubernetes_validate.latest_version())


def job_of(component: str, *args: object, **cfg: str) -> Any:
    """The request, as it goes over the wire."""
    asked = request(component, *COMPONENTS[component], *args, scheduler="kubernetes", cfg={"queue": "default", **cfg})
    assert not asked.images_to_push
    return sanitize_for_serialization(asked.resource)


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(task["template"])} for task in job["spec"]["tasks"]]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod["spec"]["containers"]
    return one


def environment(pod: dict[str, Any]) -> dict[str, str]:
    named = [(variable["name"], variable["value"]) for variable in container(pod)["env"]]
    assert len(dict(named)) == len(named), "a variable twice"
    return dict(named)


def check(job: dict[str, Any], version: str = VERSIONS[-1]) -> None:
    VALIDATOR.validate(job)
    for pod in pods(job):
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_requests_fit_the_published_schemas(component: str, version: str) -> None:
    mounts = "type=bind,src=/fsx,dst=/mnt,readonly,type=volume,src=claim,dst=/runs,type=device,src=/dev/infiniband/uverbs0"
    check(job_of(component, *CLUSTER, "--mounts", mounts, "--env", "A=1", "--max_retries", 2, priority_class="high"), version)
    check(job_of(component, "--image", IMAGE), version)


def test_the_command_line_prints_the_request() -> None:
    torchx = [Path(sys.executable).parent / "torchx", "run", "--dryrun", "--workspace", "", "-s", "kubernetes", "-cfg", "queue=default"]
    command = [*map(str, torchx), "launch/component.py:train", *COMPONENTS["train"], *map(str, CLUSTER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout.split("=== SCHEDULER REQUEST ===\n")[1])
    check(job)
    assert len(job["spec"]["tasks"]) == 2


def _pod_spec(job: dict[str, Any]) -> Any:
    return job["spec"]["tasks"][0]["template"]["spec"]


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown field of the job": lambda job: job["spec"].update(maxRetries=3),
    "unknown field of a task": lambda job: job["spec"]["tasks"][0].update(minavailable=1),
    "wrong type": lambda job: job["spec"].update(maxRetry="3"),
    "unknown event": lambda job: job["spec"]["tasks"][0].update(policies=[{"event": "PodDied", "action": "RestartJob"}]),
    "unknown kind": lambda job: job.update(kind="Jobs"),
    "underscore in a name": lambda job: job["spec"]["tasks"][0].update(name="train_0"),
    "name too long": lambda job: job["metadata"].update(name="a" * 64),
    "arguments of a plugin as text": lambda job: job["spec"]["plugins"].update(svc="--publish-not-ready-addresses"),
    "unknown field of a pod": lambda job: _pod_spec(job).update(restartpolicy="Never"),
    "unknown field of a container": lambda job: _pod_spec(job)["containers"][0].update(volumes=[]),
    "port as text": lambda job: _pod_spec(job)["containers"][0]["ports"][0].update(containerPort="29500"),
    "command as text": lambda job: _pod_spec(job)["containers"][0].update(command="bash"),
    "volume without a name": lambda job: _pod_spec(job)["volumes"][0].pop("name"),
    "misspelt host path": lambda job: _pod_spec(job)["volumes"].append({"name": "x", "hostpath": {"path": "/"}}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_schemas_refuse_what_is_wrong(wrong: str) -> None:
    job = job_of("train", *CLUSTER)
    check(job)
    WRONG[wrong](job)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(job)


@pytest.mark.parametrize("component", COMPONENTS)
def test_job_is_a_gang_of_one_task_a_node(component: str) -> None:
    job = job_of(component, *CLUSTER, priority_class="high", service_account="trainer")
    spec = job["spec"]
    assert (spec["schedulerName"], spec["queue"], spec["priorityClassName"]) == ("volcano", "default", "high")
    assert [task["name"] for task in spec["tasks"]] == [f"{component}-0", f"{component}-1"]
    # All or none start: of each task all its one pod, and of the job, where nothing is said, the sum of its tasks.
    assert [(task["replicas"], task["minAvailable"]) for task in spec["tasks"]] == [(1, 1)] * 2
    assert "minAvailable" not in spec
    for pod in pods(job):
        assert (container(pod)["image"], pod["spec"]["restartPolicy"], pod["spec"]["serviceAccountName"]) == (IMAGE, "Never", "trainer")
        # A side-car would outlive the ranks, and the pod never end.
        assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_names_and_labels_are_valid(component: str) -> None:
    job = job_of(component, *CLUSTER)
    name = job["metadata"]["name"]
    for number, (task, pod) in enumerate(zip(job["spec"]["tasks"], pods(job), strict=True)):
        host = host_of(name, task["name"]).split(".")[0]
        assert len(host) <= 63 and re.match(LABEL, host)
        labels = pod["metadata"]["labels"]
        assert labels["torchx.pytorch.org/role-name"] == component and labels["torchx.pytorch.org/replica-id"] == str(number)
        assert labels["app.kubernetes.io/instance"] == name
        assert all(len(value) <= 63 and re.match(r"^([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?$", value) for value in labels.values())
        for variable in container(pod)["env"]:
            assert re.match(r"^[A-Za-z_]\w*$", variable["name"]) and isinstance(variable["value"], str)


def test_resources() -> None:
    for pod in pods(job_of("train", *CLUSTER)):
        resources = container(pod)["resources"]
        assert resources["limits"] == {"cpu": "16000m", "memory": "65536M", "nvidia.com/gpu": "8"}
        # A GPU's request is its limit. Of the rest a little is left to the node itself.
        assert resources["requests"] == {"cpu": "15900m", "memory": "64512M", "nvidia.com/gpu": "8"}
    (pod,) = pods(job_of("evaluate", "--image", IMAGE))
    assert container(pod)["resources"] == {
        "limits": {"cpu": "2000m", "memory": "4096M"},
        "requests": {"cpu": "1900m", "memory": "3072M"},
    }


def test_named_resource_chooses_the_machine() -> None:
    (pod,) = pods(job_of("train", "--image", IMAGE, "--ranks", 8, "--h", "aws_p4d.24xlarge"))
    assert pod["spec"]["nodeSelector"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}
    limits = container(pod)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8" and all(QUANTITY.match(limit) for limit in limits.values())


def test_shared_memory_is_not_the_default_64_megabytes() -> None:
    for pod in pods(job_of("train", *CLUSTER)):
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "dshm"]
        assert volume["emptyDir"] == {"medium": "Memory"}  # up to the memory limit
        assert {"name": "dshm", "mountPath": "/dev/shm"} in container(pod)["volumeMounts"]


def test_mounts() -> None:
    for pod in pods(job_of("train", *CLUSTER, "--mounts", "type=bind,src=/fsx,dst=/data,readonly,type=volume,src=claim,dst=/mnt")):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container(pod)["volumeMounts"]}
        assert set(mounts) == {"/dev/shm", "/data", "/mnt"} and set(volumes) == {mount["name"] for mount in mounts.values()}
        assert volumes[mounts["/data"]["name"]]["hostPath"]["path"] == "/fsx" and mounts["/data"]["readOnly"] is True
        assert volumes[mounts["/mnt"]["name"]]["persistentVolumeClaim"] == {"claimName": "claim"} and mounts["/mnt"]["readOnly"] is False
        assert "privileged" not in container(pod)["securityContext"]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_HERE", "1")
    for pod in pods(job_of("train", *CLUSTER, "--env", "NCCL_DEBUG=INFO,GLOO_SOCKET_IFNAME=eth0", "--restarts", 3)):
        env = environment(pod)
        assert (env["NCCL_DEBUG"], env["GLOO_SOCKET_IFNAME"], env["PET_MAX_RESTARTS"]) == ("INFO", "eth0", "3")
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30
        assert "ONLY_HERE" not in env


@pytest.mark.parametrize("component", COMPONENTS)
def test_retries(component: str) -> None:
    job = job_of(component, *CLUSTER, "--max_retries", 3)
    assert job["spec"]["maxRetry"] == 3
    for task in job["spec"]["tasks"]:
        # A collective cannot go on without one of its nodes: all of them start anew.
        assert task["policies"] == [{"event": "PodEvicted", "action": "RestartJob"}, {"event": "PodFailed", "action": "RestartJob"}]
    # Started anew, it finds its own start in run.json; another's finished run it leaves alone.
    assert not any("--resume" in container(pod)["command"][-1] for pod in pods(job))
    # Volcano takes 0 for "not given" and puts 3; what restarts a job is a policy, and without retries there is none.
    assert not any("policies" in task for task in job_of(component, *CLUSTER)["spec"]["tasks"])


@pytest.mark.parametrize("component", COMPONENTS)
def test_ports(component: str) -> None:
    for pod in pods(job_of(component, *CLUSTER, "--rdzv_port", 31000)):
        ports = container(pod)["ports"]
        assert [port["containerPort"] for port in ports] == list(range(31000, 31000 + len(ports)))
        assert len(ports) == len(re.findall("--rdzv_endpoint", container(pod)["command"][-1]))
        assert all(len(port["name"]) <= 15 and re.match(LABEL, port["name"]) for port in ports)


def started_by(pod: dict[str, Any], env: dict[str, str], folder: Path) -> list[str]:
    """Run a pod's command with a `python` that only tells its arguments; returns them."""
    tells = folder / "python"
    tells.write_text('#!/bin/bash\nprintf "%s\\0" "$$" "$@"\n')
    tells.chmod(0o755)
    env = {**environment(pod), **env, "PATH": f"{folder}:{os.environ['PATH']}"}
    with subprocess.Popen(container(pod)["command"], stdout=subprocess.PIPE, env=env, text=True) as shell:
        assert shell.stdout is not None
        pid, *args, end = shell.stdout.read().split("\0")
    assert shell.returncode == 0 and end == ""
    assert int(pid) == shell.pid, "a shell stays in front, which does not pass Kubernetes' SIGTERM on"
    return args


@pytest.mark.parametrize("component", COMPONENTS)
def test_nodes_meet_at_the_first_pod(component: str, tmp_path: Path) -> None:
    """The service and the variables are those of Volcano's plugins; the shell's work is done by a shell."""
    job = job_of(component, *CLUSTER, "--rdzv_port", 31000)
    # Pods that wait for each other are not ready yet, and must find each other's names.
    assert job["spec"]["plugins"] == {"svc": ["--publish-not-ready-addresses"], "env": []}
    name = job["metadata"]["name"]
    hosts = {host_variable(task["name"]): host_of(name, task["name"]) for task in job["spec"]["tasks"]}
    for number, pod in enumerate(pods(job)):
        args = started_by(pod, hosts, tmp_path)
        options = [{args[at]: args[at + 1] for at in _options(args, stage)} for stage in _stages(args)]
        for stage, given in enumerate(options):
            host = host_of(name, f"{component}-0") if number else "localhost"
            assert given["--rdzv_endpoint"] == f"{host}:{31000 + stage}"
            assert (given["--rdzv_backend"], given["--nnodes"], given["--nproc_per_node"]) == ("c10d", "2", "8")
            assert given["--rdzv_id"] == name
        assert args[args.index("--run-dir") + 1] == RUN  # a space and a quote came through


def _stages(args: list[str]) -> list[range]:
    """Where the arguments of each stage lie."""
    ends = [at for at, arg in enumerate(args) if arg == "--then"]
    return [range(start, end) for start, end in zip([0, *(at + 1 for at in ends)], [*ends, len(args)], strict=True)]


def _options(args: list[str], stage: range) -> list[int]:
    return [at for at in stage if args[at].startswith("--") and at + 1 < stage.stop]
