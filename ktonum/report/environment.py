"""The environment in which results were measured: versions, device, commit, date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ktonum.declare.cases import DTYPES

__all__ = ["describe_environment"]

_PACKAGES = ("torch", "triton", "numpy", "scipy", "liger-kernel", "trl", "transformers")


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, device, commit and date for reports and tolerance tables, in types that JSON can store."""
    environment: dict[str, Any] = {
        "ktonum": _version("ktonum"),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "dtypes": list(DTYPES),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment["device"] = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    else:
        environment["device"] = {"name": f"{platform.machine()} CPU, Triton's interpreter for Triton kernels"}
    return environment


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that ktonum runs from, with ``+`` for uncommitted changes; None without a checkout."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
