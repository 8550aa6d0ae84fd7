"""Probes: one tensor under audit and how it is measured. They measure and do not decide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound, confidence
from ktonum.comparison import blocks
from ktonum.results import Measurement

__all__ = ["ENOUGH_TO_AVERAGE", "Expectation", "Probe", "bounded_probe", "equality_probe"]

#: Fewer elements than this have no error to average: the projection would repeat the norm.
ENOUGH_TO_AVERAGE = 64


@dataclass(frozen=True)
class Expectation:
    """What a tensor should be, element by element, and how far from it it may be.

    Attributes:
        expected: The right values, the tensor's shape.
        bound: Its bound; None where every element must be equal.
        scale: Multiplies the bound.
        elements: How many elements the bound has to hold for at once; None for as many as there are here.
    """

    expected: Tensor
    bound: ErrorBound | None = None
    scale: float = 1.0
    elements: int | None = None

    def narrowed(self, start: int, length: int) -> Expectation:
        """The same of ``length`` entries of the first dimension, from ``start`` on."""
        bound = self.bound
        if bound is not None:
            independent, coherent = (t.narrow(0, start, length) for t in (bound.independent, bound.coherent))
            bound = replace(bound, independent=independent, coherent=coherent)
        elements = self.elements or self.expected.numel()
        return Expectation(self.expected.narrow(0, start, length), bound, self.scale, elements)

    def tolerance(self) -> Tensor:
        """The largest error that the measure ``element`` grants each element; float64, the tensor's shape."""
        flat = self.expected.detach().double().reshape(-1)
        if self.bound is None:
            return torch.zeros_like(flat).view(self.expected.shape)
        own, shared = (t.detach().double().reshape(-1) for t in (self.bound.independent, self.bound.coherent))
        granted = _granted(flat, own, shared, self.bound, confidence(self.elements or flat.numel()), self.scale)
        return granted.view(self.expected.shape)

    def agrees(self, actual: Tensor) -> Tensor:
        """Where an element is no error at all, although it may not be a number: bool, the tensor's shape."""
        actual, expected = actual.detach(), self.expected.detach()
        if self.bound is None:
            return (actual == expected) | ((actual != actual) & (expected != expected))
        parts = actual.double(), expected.double(), self.bound.independent.double()
        return (actual.double() == expected.double()) | _same(*parts, self.bound.dtype)


@dataclass(frozen=True)
class Probe:
    """A tensor and the measurements that a check takes of it.

    Attributes:
        name: The tensor's name, e.g. ``grad_weight``.
        actual: The tensor as the candidate made it; planted defects start from it.
        measure: Measurements of such a tensor under a standard, by that standard's name.
        expectation: What the tensor is held against under a standard; None where that is more than one tensor.
    """

    name: str
    actual: Tensor
    measure: Callable[[Tensor, str], tuple[Measurement, ...]]
    expectation: Callable[[str], Expectation] | None = None


def bounded_probe(
    name: str,
    *,
    actual: Tensor,
    expected: Tensor,
    bound: Callable[[str], ErrorBound],
    scale: float = 1.0,
    enough: int | None = ENOUGH_TO_AVERAGE,
) -> Probe:
    """Hold ``actual`` against ``expected`` by element, in norm and in projection.

    Args:
        name: The tensor's name.
        actual: The candidate's tensor.
        expected: What it should be, same shape; compared in float64.
        bound: The bound under a standard.
        scale: Multiplies the bound, e.g. 2 when ``expected`` is a run of the candidate itself.
        enough: Fewer elements than this are not projected; None: none are.
    """

    def measure(tensor: Tensor, standard: str) -> tuple[Measurement, ...]:
        found = _measure(name, tensor, expected, bound(standard), scale)
        projected = enough is not None and tensor.numel() >= enough
        return tuple(m for m in found if projected or not m.name.endswith("/signed_bias"))

    return Probe(name, actual, measure, lambda standard: Expectation(expected, bound(standard), scale))


def _same(actual: Tensor, expected: Tensor, independent: Tensor, dtype: torch.dtype) -> Tensor:
    """Where something not finite is no error: the same on both sides, as a number too large is rounded, or granted."""
    rounded = expected.to(dtype).double()
    same = ~rounded.isfinite() & ((actual == rounded) | (actual.isnan() & rounded.isnan()))
    return same | independent.isinf()


def _granted(
    expected: Tensor, independent: Tensor, coherent: Tensor, bound: ErrorBound, confidence: float, scale: float
) -> Tensor:
    """The largest error granted to each element of ``expected``; flat, float64."""
    return scale * (confidence * independent + coherent + bound.final_rounding(expected))


def _measure(name: str, actual: Tensor, expected: Tensor, bound: ErrorBound, scale: float) -> tuple[Measurement, ...]:
    count = actual.numel()
    by_element, single = confidence(count), confidence()
    worst, worst_at = 0.0, 0
    squares = products = norms = variance = coherent_squares = projected_variance = projected_coherent = 0.0
    # Sums of squares would underflow where softmax gives 1e-170; a power of two changes no ratio.
    unit = _unit(expected, bound.dtype)
    tensors = (t.detach() for t in (actual, expected, bound.independent, bound.coherent))
    for start, (a, e, i, c) in blocks(*tensors):
        a, e, i, c = a.double(), e.double(), i.double(), c.double()
        same = _same(a, e, i, bound.dtype)
        a, e, i, c = (torch.where(same, 0.0, t) for t in (a, e, i, c))
        rounding = bound.final_rounding(e)
        error = a - e
        tolerance = _granted(e, i, c, bound, by_element, scale)
        # NaN compares false with everything: it must come out as the worst element. 0/0 is no error.
        use = torch.where(error == 0, 0.0, (error.abs() / tolerance).nan_to_num(nan=math.inf, posinf=math.inf))
        place = int(use.argmax()) if use.numel() else 0
        if use.numel() and float(use[place]) > worst:
            worst, worst_at = float(use[place]), start + place
        error, e, i, c, rounding = (t / unit for t in (error, e, i, c, rounding))
        amplitude = i.square() + rounding.square()
        squares += float(error.square().sum())
        products += float((error * e).sum())
        norms += float(e.square().sum())
        variance += float(amplitude.sum())
        coherent_squares += float(c.square().sum())
        projected_variance += float((amplitude * e.square()).sum())
        projected_coherent += float((c * e.abs()).sum())
    measurements = [Measurement(f"{name}/element", worst, 1.0, "bound", bound.source, _place(worst_at, actual.shape))]
    # Less than that is zero in the tensor's dtype, and has lost its digits here.
    measurable = norms > torch.finfo(torch.float64).tiny
    if measurable:
        norm = math.sqrt(norms)
        granted = math.sqrt(variance * (1 + single**2 / count)) + math.sqrt(coherent_squares)
        measurements.append(
            Measurement(f"{name}/relative_norm", math.sqrt(squares) / norm, scale * granted / norm, "1", bound.source)
        )
    if measurable:
        granted = single * math.sqrt(projected_variance) + projected_coherent
        measurements.append(
            Measurement(f"{name}/signed_bias", abs(products) / norms, scale * granted / norms, "1", bound.source)
        )
    return tuple(measurements)


def _unit(expected: Tensor, dtype: torch.dtype) -> float:
    """A power of two near the largest finite magnitude of ``expected``.

    But no less than what ``dtype`` can tell from zero, nor than what float64 can square: rounding errors and bounds,
    which are the larger ones there, would overflow in its place.
    """
    largest = max(
        (float(t.double().nan_to_num(0.0, 0.0, 0.0).abs().amax()) for _, (t,) in blocks(expected)), default=0.0
    )
    limits = torch.finfo(dtype)
    least = max(limits.tiny * limits.eps, math.sqrt(torch.finfo(torch.float64).tiny))
    return 2.0 ** math.frexp(max(largest, least))[1]


def equality_probe(name: str, *, actual: Tensor, expected: Tensor, law: str) -> Probe:
    """Every element of ``actual`` equals ``expected`` bit for bit (NaN equals NaN)."""

    def measure(tensor: Tensor, standard: str) -> tuple[Measurement, ...]:
        differing, first = 0, 0
        for start, (a, e) in blocks(tensor, expected):
            unequal = (a != e) & ~((a != a) & (e != e))
            count = int(unequal.sum())
            if count and not differing:
                first = start + int(unequal.nonzero()[0])
            differing += count
        where = _place(first, tensor.shape) if differing else ""
        return (Measurement(f"{name}/differing_elements", float(differing), 0.0, "elements", law, where),)

    return Probe(name, actual, measure, lambda standard: Expectation(expected))


def _place(flat: int, shape: torch.Size) -> str:
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)] if shape else []
    return f"[{', '.join(map(str, index))}]"
