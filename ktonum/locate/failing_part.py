"""The part of a tensor that is wrong, as the signatures see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktonum.bounds.formats import spacing

__all__ = ["EXPLAINED", "Part", "fits"]

#: A pattern explains an error when it leaves no more than this share of its square.
EXPLAINED = 0.99


@dataclass(frozen=True)
class Part:
    """Where a tensor is wrong.

    Attributes:
        actual: What is there, float64.
        expected: What should be there, float64.
        tolerance: The largest error granted to each element, at least half a unit in the last place.
        exceeding: Elements that exceed it; may be none, where all of them together are off.
        dtype: The tensor's own dtype.
        whole: The whole tensor, where the part is not all of it.
        start: Where the part begins in the whole, one index for each dim; None where it is no block.
        sizes: Numbers of the case by name, dims and parameters, in which a constant may be expressed.
        others: Other tensors of the run, by name.
    """

    actual: Tensor
    expected: Tensor
    tolerance: Tensor
    exceeding: Tensor
    dtype: torch.dtype
    whole: Part | None = None
    start: tuple[int, ...] | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def error(self) -> Tensor:
        """What is there less what should be."""
        return self.actual - self.expected

    @property
    def stored(self) -> torch.dtype:
        """The tensor's dtype, or one that holds integers of any size that matters."""
        return self.dtype if self.dtype.is_floating_point else torch.float64

    @property
    def count(self) -> int:
        """How many elements there are."""
        return self.actual.numel()

    def granted(self, pattern: Tensor) -> Tensor:
        """The tolerance where ``pattern`` stands for the expected values: rounding scales with them."""
        size = torch.where(self.expected == 0, 1.0, (pattern / self.expected).abs()).clamp(min=1.0)
        own = spacing(pattern, self.stored).view(pattern.shape) / 2
        return torch.maximum(self.tolerance * size.nan_to_num(posinf=1.0), own)


def fits(part: Part, pattern: Tensor) -> bool:
    """Whether ``pattern`` is what is there.

    Every element of it is within its tolerance, where elements exceed theirs without it; or it explains the error but
    for 1 % of its square.
    """
    if not bool(part.error.any()):
        return False
    left = (part.actual - pattern).abs()
    if bool(part.exceeding.any()) and bool((left <= part.granted(pattern)).all()):
        return True
    return float(left.square().sum()) <= (1 - EXPLAINED) * float(part.error.square().sum())
