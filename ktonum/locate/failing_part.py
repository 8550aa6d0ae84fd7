"""The part of a tensor that is wrong, in the form in which the signatures get it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktonum.bounds.formats import spacing

__all__ = ["EXPLAINED", "Part", "fits"]

#: A pattern explains an error if it accounts for at least this share of the error's sum of squares.
EXPLAINED = 0.99


@dataclass(frozen=True)
class Part:
    """The part of a tensor that is wrong; all its tensors have one shape.

    Attributes:
        actual: The values of the candidate, float64.
        expected: The right values, float64.
        tolerance: The largest error allowed for each element, at least half a unit in the last place; float64.
        exceeding: True for elements whose error is larger. There may be none if only all elements together are off.
        dtype: The tensor's own dtype.
        whole: The whole tensor if this is only a part of it, otherwise None.
        start: The index at which the part begins in the whole, for each dim; None if it is not a contiguous block.
        sizes: Numbers of the case by name (dims and parameters), which may explain a wrong constant.
        others: The same part of other tensors of the run, by name.
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
        """``actual`` minus ``expected``."""
        return self.actual - self.expected

    @property
    def stored(self) -> torch.dtype:
        """The tensor's dtype if it is floating, otherwise float64."""
        return self.dtype if self.dtype.is_floating_point else torch.float64

    @property
    def count(self) -> int:
        """The number of elements."""
        return self.actual.numel()

    def granted(self, pattern: Tensor) -> Tensor:
        """The tolerance if ``pattern`` replaces the expected values, because rounding errors scale with the values."""
        size = torch.where(self.expected == 0, 1.0, (pattern / self.expected).abs()).clamp(min=1.0)
        own = spacing(pattern, self.stored).view(pattern.shape) / 2
        return torch.maximum(self.tolerance * size.nan_to_num(posinf=1.0), own)


def fits(part: Part, pattern: Tensor) -> bool:
    """Whether ``pattern`` explains the error.

    It does if elements exceed their tolerance around the expected values, and none does around the pattern. It also
    does if the pattern accounts for 99 % of the error's sum of squares (`EXPLAINED`).
    """
    if not bool(part.error.any()):
        return False
    left = (part.actual - pattern).abs()
    if bool(part.exceeding.any()) and bool((left <= part.granted(pattern)).all()):
        return True
    return float(left.square().sum()) <= (1 - EXPLAINED) * float(part.error.square().sum())
