"""Drawing a case's inputs: once, in the dtype under audit, from the seed of the case's name."""

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
    """What an op's ``sample`` gets: the point, and random tensors on the case's device.

    Low-precision inputs are drawn once and later upcast for the oracle, never the other way round, so that candidate,
    reference and oracle see the very same values.

    Attributes:
        dims: The point's sizes.
        parameters: The point's parameters.
        distribution: The point's distribution.
        dtype: The floating dtype under audit.
        device: Where the tensors are made.
        generator: The case's generator; each draw advances it.
    """

    dims: Mapping[str, int]
    parameters: Mapping[str, Any]
    distribution: str
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @classmethod
    def of(cls, case: Case, device: torch.device | None = None, purpose: str = "inputs") -> Draw:
        """The draw for ``case``; another ``purpose`` gives an independent stream."""
        where = torch.device(case.device) if device is None else device
        generator = torch.Generator(device=where)
        generator.manual_seed(case.seed if purpose == "inputs" else seed_of(f"{case.name}/{purpose}"))
        point = case.point
        return cls(point.dims, point.parameters, point.distribution, torch_dtype(case.dtype), where, generator)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values of standard deviation ``scale``, of the given shape and the dtype under audit."""
        # Drawn in float32 whatever the dtype: the values of two dtypes then differ by rounding alone, and a float64
        # case is as exact as any, its inputs being just values.
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.mul_(scale).to(self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform values in [low, high)."""
        drawn = torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.mul_(high - low).add_(low).to(self.dtype)

    def integers(self, *shape: int, high: int, low: int = 0) -> Tensor:
        """Integers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def booleans(self, *shape: int, probability: float = 0.5) -> Tensor:
        """True with the given probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < probability

    def signs(self, *shape: int) -> Tensor:
        """±1 with equal probability, of the dtype under audit."""
        return torch.where(self.booleans(*shape), 1.0, -1.0).to(self.dtype)
