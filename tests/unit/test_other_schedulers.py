"""The requests for AWS Batch and for a Docker daemon: every field that a run needs, and their clients' own models of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ParamValidationError
from botocore.validate import validate_parameters
from docker.models.containers import _create_container_args
from moto import mock_aws

from tests.torchx_request import IMAGE, request

# TorchX warns of nodes that may be of several kinds, unless a named resource says which.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot determine resource instance type")

CLUSTER = ("--image", IMAGE, "--nodes", 2, "--ranks", 8, "--cpu", 16, "--gpu", 8, "--memMB", 65536)
TRAIN = ("--recipe", "/mnt/clicks.toml", "--run", "/mnt/run")
MOUNTS = "type=bind,src=/fsx,dst=/data,readonly,type=volume,src=fs-12345678,dst=/mnt,type=device,src=/dev/infiniband/uverbs0"


def batch(*args: object, component: str = "train", **cfg: Any) -> Any:
    return request(component, *args, scheduler="aws_batch", cfg={"queue": "gpus", **cfg})


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """AWS Batch's client, in front of moto."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    with mock_aws(config={"batch": {"use_docker": False}}):
        yield boto3.client("batch", region_name="eu-central-1")


def nodes_of(job_definition: dict[str, Any]) -> Any:
    (group,) = job_definition["nodeProperties"]["nodeRangeProperties"]
    return group


def test_batch_job_is_one_group_of_nodes() -> None:
    asked = batch(*TRAIN, *CLUSTER, "--mounts", MOUNTS, "--env", "NCCL_DEBUG=INFO", job_role_arn="arn:aws:iam::123456789012:role/reads")
    definition = asked.job_def
    assert (asked.queue, definition["type"], definition["jobDefinitionName"]) == ("gpus", "multinode", asked.name)
    assert definition["nodeProperties"]["numNodes"] == 2 and definition["nodeProperties"]["mainNode"] == 0
    group = nodes_of(definition)
    assert group["targetNodes"] == "0:1"
    container = group["container"]
    assert container["image"] == IMAGE and container["jobRoleArn"].endswith("role/reads") and container["privileged"] is False
    assert {part["type"]: part["value"] for part in container["resourceRequirements"]} == {"VCPU": "16", "MEMORY": "65536", "GPU": "8"}
    assert container["linuxParameters"]["sharedMemorySize"] == 65536
    (device,) = container["linuxParameters"]["devices"]
    assert device["hostPath"] == "/dev/infiniband/uverbs0"
    env = {variable["name"]: variable["value"] for variable in container["environment"]}
    assert env["NCCL_DEBUG"] == "INFO" and int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30
    volumes = {volume["name"]: volume for volume in container["volumes"]}
    mounted = {mount["containerPath"]: (mount["readOnly"], volumes[mount["sourceVolume"]]) for mount in container["mountPoints"]}
    assert mounted["/data"] == (True, {"name": "mount_0", "host": {"sourcePath": "/fsx"}})
    assert mounted["/mnt"] == (False, {"name": "mount_1", "efsVolumeConfiguration": {"fileSystemId": "fs-12345678"}})


def test_batch_nodes_meet_at_the_main_node() -> None:
    """Batch names the main node to all others, and not to itself: there the shell puts localhost."""
    command = nodes_of(batch(*TRAIN, *CLUSTER, "--rdzv_port", 31000).job_def)["container"]["command"]
    assert command[:2] == ["bash", "-c"]
    assert "--rdzv_endpoint ${AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:=localhost}:31000" in command[2]


def test_named_resource_chooses_the_machine() -> None:
    container = nodes_of(batch(*TRAIN, "--image", IMAGE, "--nodes", 2, "--ranks", 8, "--h", "aws_p4d.24xlarge").job_def)["container"]
    assert container["instanceType"] == "p4d.24xlarge"
    assert {"type": "GPU", "value": "8"} in container["resourceRequirements"]


@pytest.mark.parametrize(("retries", "starts"), [(0, 1), (1, 1), (3, 3)])
def test_batch_counts_the_first_start_as_one_of_its_attempts(retries: int, starts: int) -> None:
    strategy = batch(*TRAIN, *CLUSTER, "--max_retries", retries).job_def["retryStrategy"]
    assert strategy["attempts"] == starts
    assert strategy["evaluateOnExit"] == [{"onExitCode": "0", "action": "EXIT"}]


@pytest.mark.parametrize("component", ["train", "pipeline"])
def test_batch_takes_the_definition(client: Any, component: str) -> None:
    args = (*TRAIN, *(("--data", "test", "--out", "/mnt/vectors") if component == "pipeline" else ()))
    definition = batch(*args, *CLUSTER, "--mounts", MOUNTS, "--max_retries", 2, component=component).job_def
    client.register_job_definition(**definition)
    (kept,) = client.describe_job_definitions(jobDefinitionName=definition["jobDefinitionName"])["jobDefinitions"]
    assert (kept["type"], kept["status"], kept["retryStrategy"]["attempts"]) == ("multinode", "ACTIVE", 2)
    assert kept["tags"]["torchx.pytorch.org/app-name"] == component


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown field": lambda definition: nodes_of(definition)["container"].update(sharedMemory=1),
    "wrong type": lambda definition: nodes_of(definition)["container"].update(command="bash"),
    "number for text": lambda definition: nodes_of(definition)["container"]["environment"].append({"name": "A", "value": 1}),
    "missing field": lambda definition: definition.pop("type"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_batch_refuses_what_is_wrong(client: Any, wrong: str) -> None:
    definition = copy.deepcopy(batch(*TRAIN, *CLUSTER).job_def)
    shape = client.meta.service_model.operation_model("RegisterJobDefinition").input_shape
    validate_parameters(definition, shape)
    WRONG[wrong](definition)
    with pytest.raises(ParamValidationError):
        validate_parameters(definition, shape)


def docker(*args: object, **cfg: Any) -> list[dict[str, Any]]:
    """What Docker's client would send to its daemon, a container a node. Refuses options that it does not know."""
    containers = request("train", *TRAIN, *args, scheduler="local_docker", cfg=cfg).containers
    options = [{"image": each.image, "command": each.command, "detach": True, "version": "1.44", **each.kwargs} for each in containers]
    return [_create_container_args(each) for each in options]


def test_docker_container_a_node() -> None:
    mounts = "type=bind,src=/fsx,dst=/data,readonly,type=volume,src=runs,dst=/mnt,type=device,src=/dev/fuse"
    sent = docker(*CLUSTER, "--mounts", mounts, "--env", "NCCL_DEBUG=INFO", "--max_retries", 2, env={"HTTP_PROXY": "p"})
    assert len({container["name"] for container in sent}) == 2 and all(len(container["hostname"]) <= 63 for container in sent)
    for container in sent:
        host = container["host_config"]
        assert (container["image"], container["environment"]["NCCL_DEBUG"], container["environment"]["HTTP_PROXY"]) == (IMAGE, "INFO", "p")
        assert host["NanoCpus"] == 16 * 10**9 and host["Memory"] == host["ShmSize"] == 65536 * 2**20
        assert [(gpus["Count"], gpus["Capabilities"]) for gpus in host["DeviceRequests"]] == [(8, [["compute", "utility"]])]
        assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 2}
        assert [(mount["Type"], mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in host["Mounts"]] == [
            ("bind", "/fsx", "/data", True),
            ("volume", "runs", "/mnt", False),
        ]
        assert host["Devices"][0]["PathOnHost"] == "/dev/fuse"
        assert not host.get("Privileged")


def test_docker_nodes_meet_at_the_first_container() -> None:
    sent = docker(*CLUSTER, "--rdzv_port", 31000)
    (network,) = {container["host_config"]["NetworkMode"] for container in sent}
    for container in sent:
        # Containers of one network of their own find each other by name, and need no port of the machine.
        assert network == "torchx" and "PortBindings" not in container["host_config"]
        assert container["environment"]["TORCHX_RANK0_HOST"] == sent[0]["hostname"]
        assert "--rdzv_endpoint ${TORCHX_RANK0_HOST:=localhost}:31000" in container["command"][-1]


def test_docker_without_gpus_asks_for_none() -> None:
    (container,) = docker("--image", IMAGE)
    assert "DeviceRequests" not in container["host_config"] and "RestartPolicy" not in container["host_config"]


def test_docker_refuses_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="shm"):
        _create_container_args({"image": IMAGE, "command": [], "version": "1.44", "shm": "1g"})
