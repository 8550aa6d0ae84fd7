"""Points, cases and their names.

An op's author declares a `Point`: dims, parameters and input distribution. A `Case` adds dtype and device, and checks
run on cases. A case's name determines its seed, so results depend neither on the order nor on the number of workers.

This module imports torch only inside `torch_dtype`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ktonum.errors import UsageError
from ktonum.results import CaseParts

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "PROFILES", "Case", "Point", "dtype_name", "parse_dtypes", "torch_dtype"]

#: Accepted dtype names, widest last, with the name of the attribute of torch.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Point:
    """One point at which an op is audited.

    Attributes:
        dims: Sizes by name, e.g. ``{"B": 4, "T": 33}``.
        parameters: Keyword arguments of the op that are not tensors, e.g. ``{"beta": 0.3}``: text, numbers or booleans.
        distribution: The name of the input distribution, which the op's ``sample`` interprets.
        checks: Names of the checks to run at this point; empty means all that apply.
        without: Names of the checks to leave out at this point.
        dtypes: Dtype names to run at this point; empty means every requested dtype.
        devices: Device types to run at this point, e.g. ``("cuda",)`` for production sizes; empty means any.

    Raises:
        UsageError: A size is not a non-negative integer, or a parameter is not text, a number or a boolean.
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
                raise UsageError(f"dims: {name} = {size!r}: pass an integer, 0 or more")
        for name, value in self.parameters.items():
            if not isinstance(value, (str, int, float, bool)):
                raise UsageError(
                    f"parameters: {name} = {value!r}: pass text, a number or a boolean, because parameters become part "
                    f"of the case's name"
                )

    def but(self, *checks: str) -> Point:
        """This point without these checks, in addition to those in ``without``."""
        return replace(self, without=(*self.without, *checks))


@dataclass(frozen=True)
class Case:
    """A point with dtype and device: the unit that is sampled, run and reported.

    Attributes:
        op: The op's name.
        point: The point.
        dtype: The name of the dtype under audit, one of `DTYPES`.
        device: A device type (``cpu`` or ``cuda``), never an index, because the name must not depend on which GPU runs
            the case.
        offset: Number of the case among those that differ only in their seed. An audit runs offset 0.
    """

    op: str
    point: Point
    dtype: str
    device: str
    offset: int = 0

    @property
    def parts(self) -> CaseParts:
        """What the name is made of, as results keep it."""
        p = self.point
        return CaseParts(self.op, p.dims, p.parameters, p.distribution, self.dtype, self.device, self.offset)

    @property
    def name(self) -> str:
        """E.g. ``kto[B=4,T=33,H=40,V=97,beta=0.3]-bf16-cpu``, see `CaseParts`."""
        return self.parts.name

    @property
    def seed(self) -> int:
        """63 bits of the SHA-256 of the name."""
        return seed_of(self.name)


def seed_of(text: str) -> int:
    """A seed in [0, 2**63) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def parse_dtypes(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """Dtype names from ``"bf16,fp32"`` or a sequence, without duplicates; ``None`` means all of `DTYPES`.

    Raises:
        UsageError: A name is not one of `DTYPES`, or there is none.
    """
    if names is None:
        return tuple(DTYPES)
    given = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    unknown = [n for n in given if n not in DTYPES]
    if unknown or not given:
        raise UsageError(f"unknown dtype {', '.join(map(repr, unknown)) or '(none given)'}: use {', '.join(DTYPES)}")
    return tuple(dict.fromkeys(given))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype with this name in `DTYPES`."""
    import torch

    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype in `DTYPES`; for other dtypes torch's own name, e.g. ``int64``."""
    long = str(dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == long), long)
