"""The provenance of a table: how its rows were measured."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ktonum.calibrate.seed_blocks import Block, Wanted, candidates_in_words
from ktonum.declare.op import Op
from ktonum.tolerances.tables import Provenance

__all__ = ["provenance_of"]


def provenance_of(
    op: Op,
    wanted: Wanted,
    blocks: Sequence[Block],
    *,
    environment: Mapping[str, Any],
    command: str,
    false_alarm: float,
) -> Provenance:
    """The provenance of the rows that are made from ``blocks``.

    Args:
        op: The op.
        wanted: The request.
        blocks: The measured blocks. The largest size of each of their dims is recorded.
        environment: The result of `ktonum.report.environment.describe_environment`.
        command: The command line.
        false_alarm: The probability that a right result exceeds a tolerance.
    """
    packages, device = environment["packages"], environment["device"]
    dims: dict[str, int] = {}
    for block in blocks:
        for name, size in block.case.point.dims.items():
            dims[name] = max(dims.get(name, 0), size)
    return Provenance(
        device=device["name"],
        multiprocessors=device.get("multiprocessors", 0),
        ktonum=environment["ktonum"] or "",
        python=environment["python"],
        torch=packages["torch"],
        triton=packages.get("triton", ""),
        cuda=device.get("cuda") or "",
        driver=_driver() if wanted.device == "cuda" else "",
        commit=environment["commit"] or "",
        date=environment["date"],
        command=command,
        profile=wanted.profile,
        candidates=candidates_in_words(op, wanted),
        seeds=wanted.seeds,
        false_alarm=false_alarm,
        dims=dims,
    )


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
