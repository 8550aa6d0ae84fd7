"""From a failing probe to where its error is and what it looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ktonum.bounds.formats import spacing
from ktonum.locate.failing_part import Part
from ktonum.locate.places import Place, dim_names, find_place
from ktonum.locate.signatures import look_of
from ktonum.measure.probe import Expectation, Probe
from ktonum.results import Localisation

__all__ = ["Surroundings", "localise", "localise_tensor"]

# Elements looked at: a dozen float64 temporaries of this many are alive at once.
_MOST = 2**24


@dataclass(frozen=True)
class Surroundings:
    """What a case knows that an error may be made of.

    Attributes:
        dims: The case's sizes by name: dims of a tensor are called by them.
        constants: Other numbers by name: parameters, upstream gradients. What is no number is left out.
        tensors: Inputs, outputs and gradients by name.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Sizes and constants that are numbers."""
        named = {**self.constants, **self.dims}
        return {k: float(v) for k, v in named.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def localise(probe: Probe, standard: str, surroundings: Callable[[], Surroundings]) -> Localisation:
    """Where a failing probe's tensor is wrong, and what that looks like. Never raises: it says what went wrong.

    Args:
        probe: One that some measurement of fails.
        standard: What it is held to.
        surroundings: What the case knows; called here, where an exception does no harm.
    """
    try:
        if probe.expectation is None:
            return Localisation(probe.name, "not told: this check compares no single tensor", "")
        known = surroundings()
        others = {k: v for k, v in known.tensors.items() if k != probe.name.partition(" ")[0]}
        known = replace(known, tensors=others)
        return localise_tensor(probe.name, probe.actual, probe.expectation(standard), known)
    except Exception as error:  # a verdict is worth more than words about it
        return Localisation(probe.name, f"not found: localising raised {type(error).__name__}: {error}", "")


def localise_tensor(name: str, actual: Tensor, expectation: Expectation, known: Surroundings) -> Localisation:
    """Where ``actual`` exceeds what its expectation grants, and what the error looks like there.

    Args:
        name: The tensor's name.
        actual: What is there.
        expectation: What should be.
        known: What the error may be made of; tensors of any shape.
    """
    actual, note = actual.detach(), ""
    if actual.numel() > _MOST:
        actual, expectation, note = _narrowed(actual, expectation)
    tolerance, agrees = expectation.tolerance(), expectation.agrees(actual)
    a, e = actual.double(), expectation.expected.detach().double()
    exceeding = ~((a - e).abs() <= tolerance) & ~agrees  # NaN compares false
    # A zero that should be one shows no scaling, shift or sign.
    free = (a == 0) & (e == 0) if actual.is_floating_point() else None
    place = find_place(exceeding, dim_names(actual.shape, known.dims), free)
    if actual.dtype == torch.bool:
        too_many = int((exceeding & (a > e)).sum())
        looks = ((too_many, "where none should be"), (int(exceeding.sum()) - too_many, "missing"))
        return Localisation(name, place.words, ", ".join(f"{count} {words}" for count, words in looks if count))
    # An equality grants nothing; a fitted pattern is rounded all the same.
    stored = actual.dtype if actual.is_floating_point() else torch.float64
    tolerance = torch.maximum(tolerance, spacing(e.nan_to_num(0.0, 0.0, 0.0), stored).view(e.shape) / 2)
    # Where both are the same and not finite there is nothing to explain.
    strange = agrees & ~(a.isfinite() & e.isfinite())
    a, e = (torch.where(strange, 0.0, t) for t in (a, e))
    same_shape = {k: v.detach() for k, v in known.tensors.items() if v.shape == a.shape}
    part = Part(a, e, tolerance, exceeding, actual.dtype, sizes=known.numbers(), others=same_shape)
    if not place.everywhere:
        part = replace(
            part,
            actual=place.of(a),
            expected=place.of(e),
            tolerance=place.of(tolerance),
            exceeding=place.of(exceeding),
            whole=part,
            start=_start(place),
            others={k: place.of(v) for k, v in same_shape.items()},
        )
    return Localisation(name, f"{note}{place.words}", look_of(part))


def _narrowed(actual: Tensor, expectation: Expectation) -> tuple[Tensor, Expectation, str]:
    """Of a large tensor the stretch of the first dimension with the largest error in it."""
    rows = max(1, _MOST // (actual.numel() // actual.shape[0]))
    worst, start = -1.0, 0
    for first in range(0, actual.shape[0], rows):
        length = min(rows, actual.shape[0] - first)
        part = expectation.narrowed(first, length)
        error = (actual.narrow(0, first, length).double() - part.expected.double()).abs()
        # NaN is the worst error there is, 0/0 none.
        use = torch.where(error == 0, 0.0, (error / part.tolerance()).nan_to_num(nan=torch.inf))
        use = torch.where(part.agrees(actual.narrow(0, first, length)), 0.0, use)
        if float(use.amax()) > worst:
            worst, start = float(use.amax()), first
    length = min(rows, actual.shape[0] - start)
    note = f"within {start} to {start + length - 1} along dim 0, counted from there: "
    return actual.narrow(0, start, length), expectation.narrowed(start, length), note


def _start(place: Place) -> tuple[int, ...] | None:
    """Where a block begins; None for what is no block."""
    if any(kept[-1] - kept[0] + 1 != len(kept) for kept in place.indices):
        return None
    return tuple(kept[0] for kept in place.indices)
