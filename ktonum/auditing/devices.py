"""Which device a run uses. Its name is resolved here and nowhere else."""

from __future__ import annotations

import os

from ktonum.auditing.gpu_slots import visible_gpus
from ktonum.errors import UsageError

__all__ = ["DEVICES", "resolve_device"]

#: What a command accepts; `ktonum.audit` also accepts ``cuda:N``.
DEVICES = ("auto", "cpu", "cuda")


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    This does not initialise CUDA, because a worker must choose its GPU first.

    Raises:
        UsageError: Another name, no such GPU, or CUDA while ``TRITON_INTERPRET=1`` is set.
    """
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise UsageError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if kind == "cpu" or (kind == "auto" and interpreted):
        return "cpu"
    if kind == "cuda" and interpreted:
        raise UsageError(f"device {device!r} and TRITON_INTERPRET=1: unset the variable, or use device cpu")
    gpus = visible_gpus()
    if kind == "cuda" and not gpus:
        raise UsageError(f"device {device!r}: no CUDA device found; use device cpu, or run `ktonum doctor`")
    if kind == "cuda" and int(index or 0) >= len(gpus):
        raise UsageError(f"device {device!r}: torch sees {len(gpus)} CUDA devices; use cuda:0 to cuda:{len(gpus) - 1}")
    return "cuda" if gpus else "cpu"
