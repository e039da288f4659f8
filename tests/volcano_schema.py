"""Schema of a Volcano job, strict: a field that Volcano does not know is refused.

Names, types and patterns: the job's custom resource definition, config/crd/volcano/bases/batch.volcano.sh_jobs.yaml in
https://github.com/volcano-sh/volcano. Events and actions: those that its admission lets users give, pkg/webhooks/admission/jobs/validate.
Pod templates have a published schema of their own.
"""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator

LABEL = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
EVENTS = ["*", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "TaskFailed", "JobUpdated"]
ACTIONS = ["AbortJob", "RestartJob", "RestartTask", "TerminateJob", "CompleteJob", "ResumeJob"]

COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRINGS = {"type": "array", "items": {"type": "string"}}


def _object(required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


POLICIES = {
    "type": "array",
    "items": _object(
        ["action"],
        action={"enum": ACTIONS},
        event={"enum": EVENTS},
        events={"type": "array", "items": {"enum": EVENTS}},
        exitCode={"type": "integer"},
        timeout={"type": "string"},
    ),
}
TASK = _object(
    ["name", "replicas", "template"],
    dependsOn=_object(["name"], name=STRINGS, iteration={"type": "string"}),
    maxRetry=COUNT,
    minAvailable=COUNT,
    name={"type": "string", "maxLength": 63, "pattern": LABEL},
    policies=POLICIES,
    replicas=COUNT,
    template=_object(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
    topologyPolicy={"enum": ["none", "best-effort", "restricted", "single-numa-node"]},
)
SPEC = _object(
    ["tasks"],
    maxRetry=COUNT,
    minAvailable=COUNT,
    minSuccess={**COUNT, "minimum": 1},
    plugins={"type": "object", "additionalProperties": STRINGS},
    policies=POLICIES,
    priorityClassName={"type": "string", "maxLength": 253, "pattern": SUBDOMAIN},
    queue={"type": "string", "maxLength": 253, "pattern": SUBDOMAIN},
    runningEstimate={"type": "string"},
    schedulerName={"type": "string", "maxLength": 63},
    tasks={"type": "array", "minItems": 1, "items": TASK},
    ttlSecondsAfterFinished=COUNT,
    volumes={"type": "array"},
)
JOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "batch.volcano.sh/v1alpha1"},
    kind={"const": "Job"},
    metadata=_object(
        ["name"],
        # The plugin for names of hosts makes a service of the job's name, and a service begins with a letter.
        name={"type": "string", "maxLength": 63, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        namespace={"type": "string", "maxLength": 63, "pattern": LABEL},
        labels={"type": "object", "additionalProperties": {"type": "string"}},
        annotations={"type": "object", "additionalProperties": {"type": "string"}},
    ),
    spec=SPEC,
)
VALIDATOR = Draft202012Validator(JOB)


def host_variable(task: str) -> str:
    """The environment variable that names a task's hosts: pkg/controllers/job/plugins/svc, in the same repository."""
    return f"VC_{task.replace('-', '_').upper()}_HOSTS"


def host_of(job: str, task: str, replica: int = 0) -> str:
    """A pod's name among the job's pods: its own, and the job's service as subdomain."""
    return f"{job}-{task}-{replica}.{job}"
