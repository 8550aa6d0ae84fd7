"""Sums, the worst element, and the number of elements that are not finite, accumulated over the blocks of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ErrorSums", "Nonfinite", "Worst", "same"]


@dataclass
class ErrorSums:
    """Sums over elements, with the errors d and the expected values e.

    Attributes:
        squares: Σ d².
        products: Σ d e.
        norms: Σ e².
    """

    squares: float = 0.0
    products: float = 0.0
    norms: float = 0.0

    def add(self, error: Tensor, expected: Tensor) -> None:
        """Add the elements of a block. Both tensors are float64, finite, and of one shape."""
        self.squares += float(error.square().sum())
        self.products += float((error * expected).sum())
        self.norms += float(expected.square().sum())

    @property
    def relative_norm(self) -> float:
        """‖d‖ / ‖e‖; ``inf`` if only e is zero."""
        return _ratio(math.sqrt(self.squares), math.sqrt(self.norms))

    @property
    def signed_bias(self) -> float:
        """⟨d, e⟩ / ‖e‖²; ``inf`` if only e is zero."""
        return _ratio(self.products, self.norms)


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else math.inf
    return numerator / denominator


@dataclass
class Worst:
    """The largest of many numbers and its flat index; 0 at index 0 if no number is larger than 0."""

    value: float = 0.0
    place: int = 0

    def update(self, numbers: Tensor, start: int) -> None:
        """Take a block of numbers into account; ``start`` is the flat index of its first number."""
        flat = numbers.reshape(-1)
        place = int(flat.argmax())
        if float(flat[place]) > self.value:
            self.value, self.place = float(flat[place]), start + place


@dataclass
class Nonfinite:
    """Elements that are NaN or infinite on one side, and not the same on the other side.

    Attributes:
        count: The number of such elements.
        first: The flat index of the first one; 0 if there are none.
    """

    count: int = 0
    first: int = 0

    def usable(self, actual: Tensor, expected: Tensor, start: int) -> Tensor:
        """Count, and return where both sides of a block are finite; ``start`` is its first element's flat index."""
        finite = actual.isfinite() & expected.isfinite()
        strange = ~finite & ~same(actual, expected)
        found = int(strange.sum())
        if found and not self.count:
            self.first = start + int(strange.reshape(-1).nonzero()[0])
        self.count += found
        return finite


def same(actual: Tensor, expected: Tensor) -> Tensor:
    """Where elements are equal, or both are NaN."""
    return (actual == expected) | (actual.isnan() & expected.isnan())
