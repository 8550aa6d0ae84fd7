"""What a bound grants a tensor, and how far a tensor is from what it should be: by element, in norm, in projection."""

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

# Of tensors up to this size what is granted is kept: planted defects are measured against it dozens of times, and to
# derive it takes longer than to measure. No more than a block of `ktonum.measure.comparison.blocks`.
_KEPT = 2**20


def same_if_not_finite(actual: Tensor, expected: Tensor, independent: Tensor, dtype: torch.dtype) -> Tensor:
    """Where something not finite is no error: the same on both sides, as a number too large is rounded, or granted."""
    rounded = expected.to(dtype).double()
    same = ~rounded.isfinite() & ((actual == rounded) | (actual.isnan() & rounded.isnan()))
    return same | independent.isinf()


def granted(
    expected: Tensor, independent: Tensor, coherent: Tensor, bound: ErrorBound, confidence: float, scale: float
) -> Tensor:
    """The largest error granted to each element of ``expected``; flat, float64."""
    return scale * (confidence * independent + coherent + bound.final_rounding(expected))


@dataclass(frozen=True)
class _Block:
    """What is granted to a stretch of elements, whatever they turn out to be.

    Attributes:
        expected: Flat, float64; 0 where an element is left out.
        tolerance: The largest error granted to each element.
        sums: Over the elements, over powers of `GrantedErrors.unit`: e², a², c², (a e)², c |e|, r e, with the amplitude
            a of independent errors, rounding included, the bound c on coherent ones, and the error r of rounding e.
    """

    expected: Tensor
    tolerance: Tensor
    sums: tuple[float, ...]


class GrantedErrors:
    """A tensor's bound, and the three measures held against it.

    Attributes:
        expected: The right values, the tensor's shape.
        bound: Their bound.
        scale: Multiplies the bound.
        unit: A power of two near the largest magnitude: sums of squares would underflow where softmax gives 1e-170,
            and a power of two changes no ratio.
    """

    def __init__(self, expected: Tensor, bound: ErrorBound, scale: float) -> None:
        self.expected = expected.detach()
        self.bound = bound
        self.scale = scale
        self._own, self._shared = bound.independent.detach(), bound.coherent.detach()

    @property
    def kept(self) -> bool:
        """Whether the tensor is small enough that what it is granted is kept."""
        return self.expected.numel() <= _KEPT

    @cached_property
    def unit(self) -> float:
        """See the class. No less than what the dtype can tell from zero, nor than what float64 can square.

        Rounding errors and bounds, which are the larger ones there, would overflow in its place.
        """
        largest = max(
            (float(t.double().nan_to_num(0.0, 0.0, 0.0).abs().amax()) for _, (t,) in blocks(self.expected)), default=0.0
        )
        limits = torch.finfo(self.bound.dtype)
        least = max(limits.tiny * limits.eps, math.sqrt(torch.finfo(torch.float64).tiny))
        return 2.0 ** math.frexp(max(largest, least))[1]

    @cached_property
    def _whole(self) -> _Block | None:
        """All elements as one block, where it is kept and none may have to be left out."""
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
        # Gradients of half float16's smallest number are rounded to zero, all in one direction: what rounding the right
        # values does to their projection is known, and no matter of chance.
        rounded = expected.to(self.bound.dtype).double() - expected
        rounded = torch.where(rounded.isfinite(), rounded, 0.0)
        e, i, c, rounding, r = (t / self.unit for t in (expected, independent, coherent, rounding, rounded))
        amplitude, squares = i.square() + rounding.square(), e.square()
        summed = (squares, amplitude, c.square(), amplitude * squares, c * e.abs(), r * e)
        return _Block(expected, tolerance, tuple(torch.stack([t.sum() for t in summed]).tolist()))

    def _block(self, actual: Tensor, expected: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, _Block]:
        """``actual`` and what it is granted, without the elements that are no error although they are not finite."""
        e, i, c = expected.double(), own.double(), shared.double()
        same = same_if_not_finite(actual, e, i, self.bound.dtype)
        actual, e, i, c = (torch.where(same, 0.0, t) for t in (actual, e, i, c))
        return actual, self._granted(e, i, c)

    def measure(self, tensor: str, actual: Tensor, context: str = "") -> tuple[Measurement, ...]:
        """The measures ``element``, ``relative_norm`` and ``signed_bias`` of ``actual``, which is called ``tensor``.

        The last two are left out where everything expected is zero.
        """
        worst = Worst()
        squares = products = 0.0
        sums = [0.0] * 6
        for start, (a, e, i, c) in blocks(actual.detach(), self.expected, self._own, self._shared):
            a, block = a.double(), self._whole
            if block is None:
                a, block = self._block(a, e, i, c)
            error = a - block.expected
            # NaN compares false with everything: it must come out as the worst element. 0/0 is no error.
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
        # Less than that is zero in the tensor's dtype, and has lost its digits here.
        if norms <= torch.finfo(torch.float64).tiny:
            return (of_element,)
        norm = math.sqrt(norms)
        in_norm = norm_bound(variance=variance, coherent_squares=coherent_squares, count=actual.numel())
        projected = projection_bound(variance=projected_variance, coherent=projected_coherent) + abs(projected_rounding)
        of_norm = measured("relative_norm", math.sqrt(squares) / norm, scale * in_norm / norm)
        in_projection = scale * (projected / norms + abs(self.bound.bias))
        of_bias = measured("signed_bias", abs(products) / norms, in_projection)
        return (of_element, of_norm, of_bias)
