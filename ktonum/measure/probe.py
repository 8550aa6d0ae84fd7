"""A probe is one tensor under audit and the way to measure it. Probes do not decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound, confidence
from ktonum.measure.against_bound import GrantedErrors, granted, same_if_not_finite
from ktonum.measure.comparison import blocks, unravelled
from ktonum.results import BoundKind, BoundSource, Measurement

__all__ = ["ENOUGH_TO_AVERAGE", "Expectation", "Probe", "bounded_probe", "equality_probe"]

#: Errors of fewer elements than this do not average out, so the projection would say the same as the norm.
ENOUGH_TO_AVERAGE = 64


@dataclass(frozen=True)
class Expectation:
    """The right values of a tensor, and how far from them it may be.

    Attributes:
        expected: The right values, in the tensor's shape.
        bound: Their bound; None if every element must be equal.
        scale: Multiplies the bound.
        elements: The number of elements for which the bound must hold at once; None for the number of elements here.
    """

    expected: Tensor
    bound: ErrorBound | None = None
    scale: float = 1.0
    elements: int | None = None

    def narrowed(self, start: int, length: int) -> Expectation:
        """The same for ``length`` entries of the first dimension, from ``start`` on."""
        bound = self.bound
        if bound is not None:
            independent, coherent = (t.narrow(0, start, length) for t in (bound.independent, bound.coherent))
            bound = replace(bound, independent=independent, coherent=coherent)
        elements = self.elements or self.expected.numel()
        return Expectation(self.expected.narrow(0, start, length), bound, self.scale, elements)

    def tolerance(self) -> Tensor:
        """The largest error that the measure ``element`` grants each element; float64, in the tensor's shape."""
        flat = self.expected.detach().double().reshape(-1)
        if self.bound is None:
            return torch.zeros_like(flat).view(self.expected.shape)
        own, shared = (t.detach().double().reshape(-1) for t in (self.bound.independent, self.bound.coherent))
        within = granted(flat, own, shared, self.bound, confidence(self.elements or flat.numel()), self.scale)
        return within.view(self.expected.shape)

    def agrees(self, actual: Tensor) -> Tensor:
        """Where an element is right, including NaN and infinities that are right; bool, in the tensor's shape."""
        actual, expected = actual.detach(), self.expected.detach()
        if self.bound is None:
            return (actual == expected) | ((actual != actual) & (expected != expected))
        parts = actual.double(), expected.double(), self.bound.independent.double()
        return (actual.double() == expected.double()) | same_if_not_finite(*parts, self.bound.dtype)


@dataclass(frozen=True)
class Probe:
    """A tensor and the measurements that a check takes of it.

    Attributes:
        tensor: The tensor's name, e.g. ``grad_weight``.
        actual: The tensor as the candidate made it; planted defects start from it.
        measure: Takes such a tensor and the name of a standard, and returns measurements.
        expectation: Takes the name of a standard, and returns the right values and their bound. None if the tensor is
            compared with more than one tensor.
        context: The circumstances in which it was made, as in `Measurement`.
    """

    tensor: str
    actual: Tensor
    measure: Callable[[Tensor, str], tuple[Measurement, ...]]
    expectation: Callable[[str], Expectation] | None = None
    context: str = ""


def bounded_probe(
    tensor: str,
    *,
    actual: Tensor,
    expected: Tensor,
    bound: Callable[[str], ErrorBound],
    scale: float = 1.0,
    enough: int | None = ENOUGH_TO_AVERAGE,
    context: str = "",
) -> Probe:
    """Compare ``actual`` with ``expected`` by element, in norm and in projection.

    Args:
        tensor: The tensor's name.
        actual: The candidate's tensor.
        expected: The right values in the same shape; compared in float64.
        bound: Takes the name of a standard, and returns the bound.
        scale: Multiplies the bound, e.g. by 2 if ``expected`` is a run of the candidate itself.
        enough: A tensor with fewer elements has no measure ``signed_bias``; None: it never has one.
        context: The circumstances in which the tensor was made, as in `Measurement`.
    """

    known: dict[str, GrantedErrors] = {}

    def errors(standard: str) -> GrantedErrors:
        if standard in known:
            return known[standard]
        found = GrantedErrors(expected, bound(standard), scale)
        if found.kept:
            known[standard] = found
        return found

    def measure(found: Tensor, standard: str) -> tuple[Measurement, ...]:
        measured = errors(standard).measure(tensor, found, context)
        projected = enough is not None and found.numel() >= enough
        return tuple(m for m in measured if projected or m.measure != "signed_bias")

    return Probe(tensor, actual, measure, lambda s: Expectation(expected, errors(s).bound, scale), context)


def equality_probe(
    tensor: str,
    *,
    actual: Tensor,
    expected: Tensor,
    law: str,
    measure: str = "differing_elements",
    context: str = "",
) -> Probe:
    """Count the elements of ``actual`` that differ from ``expected`` in any bit. NaN equals NaN.

    Args:
        tensor: The tensor's name.
        actual: The candidate's tensor.
        expected: The right values in the same shape.
        law: The reason why they must be equal, in words that follow "must be exact:".
        measure: The name of the number of elements that differ.
        context: The circumstances in which the tensor was made, as in `Measurement`.
    """
    source = BoundSource(BoundKind.EXACT, text=law)

    def count(found: Tensor, standard: str) -> tuple[Measurement, ...]:
        differing, first = 0, 0
        for start, (a, e) in blocks(found, expected):
            unequal = (a != e) & ~((a != a) & (e != e))
            here = int(unequal.sum())
            if here and not differing:
                first = start + int(unequal.nonzero()[0])
            differing += here
        where = unravelled(first, found.shape) if differing else None
        return (Measurement(tensor, measure, float(differing), 0.0, "elements", source, where, context=context),)

    return Probe(tensor, actual, count, lambda standard: Expectation(expected), context)
