"""Points, cases and their names.

A `Point` is what an op's author writes down: dims, parameters, input distribution. A `Case` adds dtype and device and
is what a check runs on. Its name determines its seed, so results do not depend on order or on how many workers run.

A leaf: torch is imported only inside `torch_dtype`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ktonum.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "PROFILES", "Case", "Point", "dtype_name", "parse_dtypes", "torch_dtype"]

#: Accepted dtype names, widest last, with the torch attribute each stands for.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Point:
    """One place where an op is audited.

    Attributes:
        dims: Sizes by name, e.g. ``{"B": 4, "T": 33}``.
        parameters: Keyword arguments of the op that are no tensors, e.g. ``{"beta": 0.3}``; text, numbers, booleans.
        distribution: The input distribution's name, as the op's ``sample`` understands it.
        checks: Names of the checks to run here; empty means all that apply.
        without: Names of checks that have nothing to say here.
        dtypes: Dtype names to run here; empty means every dtype asked for.
        devices: Device types to run here; empty means any. Production sizes are for GPUs.
    """

    dims: Mapping[str, int]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    distribution: str = "normal"
    checks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, size in self.dims.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise UsageError(f"dims must be non-negative integers: {name} = {size!r}")
        for name, value in self.parameters.items():
            if not isinstance(value, (str, int, float, bool)):
                raise UsageError(
                    f"parameters must be text, numbers or booleans, for they become part of the case's name: "
                    f"{name} = {value!r}"
                )

    def but(self, *checks: str) -> Point:
        """This point without the checks called so, beside those it goes without already."""
        return replace(self, without=(*self.without, *checks))


@dataclass(frozen=True)
class Case:
    """A point with dtype and device: the unit that is sampled, run and reported.

    ``device`` is a type (``cpu`` or ``cuda``), never an index: which GPU runs a case must not change its name.
    ``offset`` numbers cases that differ in their seed alone; an audit runs those of offset 0.
    """

    op: str
    point: Point
    dtype: str
    device: str
    offset: int = 0

    @property
    def name(self) -> str:
        """E.g. ``kto[B=4,T=33,H=40,V=97,beta=0.3]-bf16-cpu``; the distribution appears when it is not ``normal``.

        An offset comes last, as ``+1``.
        """
        parts = [f"{k}={v}" for k, v in (*self.point.dims.items(), *self.point.parameters.items())]
        tail = "" if self.point.distribution == "normal" else f"-{self.point.distribution}"
        tail += f"+{self.offset}" if self.offset else ""
        return f"{self.op}[{','.join(parts)}]-{self.dtype}-{self.device}{tail}"

    @property
    def seed(self) -> int:
        """63 bits of the SHA-256 of the name."""
        return seed_of(self.name)


def seed_of(text: str) -> int:
    """A seed in [0, 2**63) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def parse_dtypes(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """Dtype names from ``"bf16,fp32"``, a sequence, or ``None`` for all.

    Raises:
        UsageError: A name is not one of `DTYPES`, or none was given.
    """
    if names is None:
        return tuple(DTYPES)
    given = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    unknown = [n for n in given if n not in DTYPES]
    if unknown or not given:
        raise UsageError(f"unknown dtype {', '.join(map(repr, unknown)) or '(none given)'}: use {', '.join(DTYPES)}")
    return tuple(dict.fromkeys(given))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name`` here."""
    import torch

    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The inverse of `torch_dtype`; other dtypes keep torch's own name."""
    long = str(dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == long), long)
