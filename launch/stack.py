"""The packages below fit together, or the user is told in one line which to install."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from .faults.reasons import INPUT, leave_reason

FITTING = {"2.13": "1.8", "2.12": "1.7", "2.11": "1.6"}
"""torch -> fbgemm-gpu and torchrec. Any other pair dies on import with an undefined symbol."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _minor(text: str) -> str:
    return ".".join(text.split(".")[:2])


def mismatch(torch: str | None, torchrec: str | None, fbgemm_cpu: str | None, fbgemm_cuda: str | None) -> str | None:
    """One line that says what to install, or None where the versions fit."""
    if torch is None or torchrec is None or (fbgemm_cpu is None and fbgemm_cuda is None):
        missing = [
            name for name, v in (("torch", torch), ("torchrec", torchrec), ("fbgemm-gpu-cpu", fbgemm_cpu or fbgemm_cuda)) if v is None
        ]
        return f"not installed: {', '.join(missing)}; run 'make install', or 'make install DEVICE=cuda' on a GPU machine"
    wanted = FITTING.get(_minor(torch))
    if wanted is None:
        return f"torch {torch} is not supported; install one of torch {', '.join(f'{t} with torchrec {r}' for t, r in FITTING.items())}"
    if fbgemm_cpu is not None and fbgemm_cuda is not None:
        return (
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other; uninstall both, "
            f"then: pip install --no-deps fbgemm-gpu-cpu=={wanted}.0 (or fbgemm-gpu=={wanted}.0 on a GPU machine)"
        )
    package = "fbgemm-gpu-cpu" if fbgemm_cpu is not None else "fbgemm-gpu"
    for name, found in ((package, fbgemm_cpu or fbgemm_cuda), ("torchrec", torchrec)):
        if found is not None and _minor(found) != wanted:
            install = f"pip install --no-deps {package}=={wanted}.0 torchrec=={wanted}.0"
            return f"torch {torch} needs {name} {wanted}.x, found {found}; run: {install}"
    return None


def has_cuda_kernels() -> bool:
    """Whether the installed FBGEMM is the CUDA build."""
    return _version("fbgemm-gpu") is not None


def check() -> None:
    """Raises SystemExit with one line unless torch, torchrec and FBGEMM fit. Call it before importing any of them."""
    found = mismatch(_version("torch"), _version("torchrec"), _version("fbgemm-gpu-cpu"), _version("fbgemm-gpu"))
    if found is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        leave_reason("input", found)
        os._exit(INPUT)
    if found is not None:
        raise SystemExit(f"triptych: {found}")
