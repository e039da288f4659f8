"""What a component asks of a scheduler, without the scheduler: TorchX's dry run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchx.runner import get_runner

ROOT = Path(__file__).parents[1]
COMPONENT = ROOT / "launch" / "component.py"
IMAGE = "registry.example.com/team/triptych:1"


def request(component: str, *args: object, scheduler: str, cfg: Mapping[str, Any] | None = None) -> Any:
    """The scheduler's own request object, of a component of component.py."""
    with get_runner() as runner:
        dryrun = runner.dryrun_component(f"{COMPONENT}:{component}", [str(arg) for arg in args], scheduler, dict(cfg or {}), workspace=None)
    return dryrun.request
