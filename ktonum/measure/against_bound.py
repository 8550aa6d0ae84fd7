"""The errors that a bound grants a tensor, and the tensor's own error: by element, in norm and in projection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound, confidence
from ktonum.bounds.error_bounds import norm_bound, projection_bound
from ktonum.measure.accumulation import Worst
from ktonum.measure.comparison import blocks, unravelled
from ktonum.results import Measurement

__all__ = ["GrantedErrors", "granted", "same_if_not_finite"]

# For tensors up to this size the granted errors are kept. Planted defects are compared with them dozens of times, and
# computing them takes longer than measuring. At most the size of a block of `ktonum.measure.comparison.blocks`.
_KEPT = 2**20


def same_if_not_finite(actual: Tensor, expected: Tensor, independent: Tensor, dtype: torch.dtype) -> Tensor:
    """Where an element that is not finite is not an error: it is the rounded right value, or any error is granted."""
    rounded = expected.to(dtype).double()
    same = ~rounded.isfinite() & ((actual == rounded) | (actual.isnan() & rounded.isnan()))
    return same | independent.isinf()


def granted(
    expected: Tensor, independent: Tensor, coherent: Tensor, bound: ErrorBound, confidence: float, scale: float
) -> Tensor:
    """The largest granted error of each element of ``expected``; flat, float64."""
    return scale * (confidence * independent + coherent + bound.final_rounding(expected))


@dataclass(frozen=True)
class _Block:
    """The errors granted to a block of elements, which do not depend on the candidate.

    Attributes:
        expected: Flat, float64; 0 where an element is left out.
        tolerance: The largest granted error of each element.
        sums: Sums over the elements of e², a², c², (a e)², c |e| and r e, each divided by a power of
            `GrantedErrors.unit`. Here e is the right value, a the amplitude of independent errors including the final
            rounding, c the bound on coherent errors, and r the error of rounding e.
    """

    expected: Tensor
    tolerance: Tensor
    sums: tuple[float, ...]


class GrantedErrors:
    """A tensor's bound, and the three measures that are compared with it.

    Attributes:
        expected: The right values, in the tensor's shape.
        bound: Their bound.
        scale: Multiplies the bound.
        unit: A power of two near the largest magnitude. Sums are in this unit, because squares of values such as
            1e-170, which softmax gives, would underflow. A power of two does not change ratios.
    """

    def __init__(self, expected: Tensor, bound: ErrorBound, scale: float) -> None:
        self.expected = expected.detach()
        self.bound = bound
        self.scale = scale
        self._own, self._shared = bound.independent.detach(), bound.coherent.detach()

    @property
    def kept(self) -> bool:
        """Whether the tensor is small enough to keep its granted errors."""
        return self.expected.numel() <= _KEPT

    @cached_property
    def unit(self) -> float:
        """See the class. At least the dtype's smallest number, and a number whose square float64 can store.

        In a smaller unit, rounding errors and bounds would overflow, because they are larger than the values there.
        """
        largest = max(
            (float(t.double().nan_to_num(0.0, 0.0, 0.0).abs().amax()) for _, (t,) in blocks(self.expected)), default=0.0
        )
        limits = torch.finfo(self.bound.dtype)
        least = max(limits.tiny * limits.eps, math.sqrt(torch.finfo(torch.float64).tiny))
        return 2.0 ** math.frexp(max(largest, least))[1]

    @cached_property
    def _whole(self) -> _Block | None:
        """All elements as one block; None if it is not kept, or if elements may have to be left out."""
        if not self.kept or not self.expected.numel():
            return None
        e, i, c = (t.reshape(-1).double() for t in (self.expected, self._own, self._shared))
        if bool(i.isinf().any()) or not bool(e.to(self.bound.dtype).isfinite().all()):
            return None
        return self._granted(e, i, c)

    def _granted(self, expected: Tensor, independent: Tensor, coherent: Tensor) -> _Block:
        by_element = confidence(self.expected.numel())
        tolerance = granted(expected, independent, coherent, self.bound, by_element, self.scale)
        rounding = self.bound.final_rounding(expected)
        # Rounding may move all values in one direction: gradients of half float16's smallest number become zero. The
        # projection of the rounding errors of the right values is known, so it does not count as chance.
        rounded = expected.to(self.bound.dtype).double() - expected
        rounded = torch.where(rounded.isfinite(), rounded, 0.0)
        e, i, c, rounding, r = (t / self.unit for t in (expected, independent, coherent, rounding, rounded))
        amplitude, squares = i.square() + rounding.square(), e.square()
        summed = (squares, amplitude, c.square(), amplitude * squares, c * e.abs(), r * e)
        return _Block(expected, tolerance, tuple(torch.stack([t.sum() for t in summed]).tolist()))

    def _block(self, actual: Tensor, expected: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, _Block]:
        """``actual`` and its granted errors, both without the elements that are not finite and not wrong."""
        e, i, c = expected.double(), own.double(), shared.double()
        same = same_if_not_finite(actual, e, i, self.bound.dtype)
        actual, e, i, c = (torch.where(same, 0.0, t) for t in (actual, e, i, c))
        return actual, self._granted(e, i, c)

    def measure(self, tensor: str, actual: Tensor, context: str = "") -> tuple[Measurement, ...]:
        """The measures ``element``, ``relative_norm`` and ``signed_bias`` of ``actual``, whose name is ``tensor``.

        The last two are left out if all right values are zero.
        """
        worst = Worst()
        squares = products = 0.0
        sums = [0.0] * 6
        for start, (a, e, i, c) in blocks(actual.detach(), self.expected, self._own, self._shared):
            a, block = a.double(), self._whole
            if block is None:
                a, block = self._block(a, e, i, c)
            error = a - block.expected
            # NaN compares false with everything, but must be the worst element. 0/0 is not an error.
            use = (error.abs() / block.tolerance).nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(error == 0, 0)
            worst.update(use, start)
            error /= self.unit
            squares += float(error.square().sum())
            products += float((error * (block.expected / self.unit)).sum())
            sums = [total + part for total, part in zip(sums, block.sums, strict=True)]
        scale = self.scale
        measured = partial(Measurement, tensor, bound_source=self.bound.source, context=context)
        place_of_worst = unravelled(worst.place, actual.shape)
        of_element = measured("element", worst.value, 1.0, "bound", where=place_of_worst)
        norms, variance, coherent_squares, projected_variance, projected_coherent, projected_rounding = sums
        # A smaller norm is zero in the tensor's dtype, and its digits are lost here.
        if norms <= torch.finfo(torch.float64).tiny:
            return (of_element,)
        norm = math.sqrt(norms)
        in_norm = norm_bound(variance=variance, coherent_squares=coherent_squares, count=actual.numel())
        projected = projection_bound(variance=projected_variance, coherent=projected_coherent) + abs(projected_rounding)
        of_norm = measured("relative_norm", math.sqrt(squares) / norm, scale * in_norm / norm)
        in_projection = scale * (projected / norms + abs(self.bound.bias))
        of_bias = measured("signed_bias", abs(products) / norms, in_projection)
        return (of_element, of_norm, of_bias)
