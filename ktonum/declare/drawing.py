"""Draws a case's inputs once, in the dtype under audit, with the seed of the case's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.cases import Case, seed_of, torch_dtype

__all__ = ["Draw"]


@dataclass(frozen=True)
class Draw:
    """The argument of an op's ``sample``: the point, and methods that draw random tensors on the case's device.

    Inputs are drawn once in the dtype under audit. The oracle gets them upcast. So candidate, reference and oracle see
    exactly the same values.

    Attributes:
        dims: The point's sizes by name.
        parameters: The point's parameters by name.
        distribution: The name of the point's distribution.
        dtype: The floating dtype under audit.
        device: The device of the tensors.
        generator: The case's random generator; each draw advances it.
    """

    dims: Mapping[str, int]
    parameters: Mapping[str, Any]
    distribution: str
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @classmethod
    def of(cls, case: Case, device: torch.device | None = None, purpose: str = "inputs") -> Draw:
        """The draw for ``case``. Each ``purpose`` has an independent random stream."""
        where = torch.device(case.device) if device is None else device
        generator = torch.Generator(device=where)
        generator.manual_seed(case.seed if purpose == "inputs" else seed_of(f"{case.name}/{purpose}"))
        point = case.point
        return cls(point.dims, point.parameters, point.distribution, torch_dtype(case.dtype), where, generator)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values of standard deviation ``scale``, of the given shape and the dtype under audit."""
        # Draw in float32 for every dtype, so that the values of two dtypes differ only by rounding. This is no loss for
        # float64, because the oracle gets the same values.
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.mul_(scale).to(self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform values in [low, high), drawn in float32 and rounded to the dtype under audit."""
        drawn = torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.mul_(high - low).add_(low).to(self.dtype)

    def integers(self, *shape: int, high: int, low: int = 0) -> Tensor:
        """Integers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def booleans(self, *shape: int, probability: float = 0.5) -> Tensor:
        """Booleans that are True with the given probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < probability

    def signs(self, *shape: int) -> Tensor:
        """+1 or −1 with equal probability, in the dtype under audit."""
        return torch.where(self.booleans(*shape), 1.0, -1.0).to(self.dtype)
