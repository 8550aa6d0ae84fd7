"""Where the error of a failing probe is and what it looks like."""

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

# The most elements that are examined, because a dozen float64 tensors of this size exist at the same time.
_MOST = 2**24


@dataclass(frozen=True)
class Surroundings:
    """Sizes, constants and tensors of a case that may explain an error.

    Attributes:
        dims: The case's sizes by name. A report calls the dims of a tensor by these names.
        constants: Parameters and upstream gradients by name. Those that are not numbers are ignored.
        tensors: Inputs, outputs and gradients by name.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Sizes and those constants that are numbers, by name."""
        named = {**self.constants, **self.dims}
        return {k: float(v) for k, v in named.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def localise(probe: Probe, standard: str, surroundings: Callable[[], Surroundings]) -> Localisation:
    """Where a failing probe's tensor is wrong, and what the error looks like.

    It never raises an exception. If it cannot find the place, the result says why.

    Args:
        probe: A probe with a failing measurement.
        standard: The standard that the candidate is held to.
        surroundings: Makes the `Surroundings`. It is called here so that an exception does no harm.
    """
    try:
        if probe.expectation is None:
            return Localisation(
                probe.tensor, "not localised: this check does not compare single tensors", "", probe.context
            )
        known = surroundings()
        known = replace(known, tensors={k: v for k, v in known.tensors.items() if k != probe.tensor})
        found = localise_tensor(probe.tensor, probe.actual, probe.expectation(standard), known)
        return replace(found, context=probe.context)
    except Exception as error:  # the verdict must not depend on its explanation
        words = f"not found: localising raised {type(error).__name__}: {error}"
        return Localisation(probe.tensor, words, "", probe.context)


def localise_tensor(name: str, actual: Tensor, expectation: Expectation, known: Surroundings) -> Localisation:
    """Where ``actual`` is further from its expectation than the tolerance, and what the error looks like there.

    Args:
        name: The tensor's name.
        actual: The values of the candidate; any shape and dtype.
        expectation: The right values in the same shape, and their tolerance.
        known: Sizes, constants and tensors that may explain the error; tensors of another shape are ignored.
    """
    actual, note = actual.detach(), ""
    if actual.numel() > _MOST:
        actual, expectation, note = _narrowed(actual, expectation)
    tolerance, agrees = expectation.tolerance(), expectation.agrees(actual)
    a, e = actual.double(), expectation.expected.detach().double()
    exceeding = ~((a - e).abs() <= tolerance) & ~agrees  # NaN compares false
    # A zero that is expected to be zero shows neither a scaling nor a wrong sign.
    free = (a == 0) & (e == 0) if actual.is_floating_point() else None
    place = find_place(exceeding, dim_names(actual.shape, known.dims), free)
    if actual.dtype == torch.bool:
        too_many = int((exceeding & (a > e)).sum())
        looks = ((too_many, "too many"), (int(exceeding.sum()) - too_many, "missing"))
        return Localisation(name, place.words, ", ".join(f"{count} {words}" for count, words in looks if count))
    # An equality has a tolerance of zero, but the values of a fitted pattern are rounded.
    stored = actual.dtype if actual.is_floating_point() else torch.float64
    tolerance = torch.maximum(tolerance, spacing(e.nan_to_num(0.0, 0.0, 0.0), stored).view(e.shape) / 2)
    # Elements that agree and are not finite need no explanation.
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
    """The part of a large tensor that has the largest error: a range of indices along the first dim."""
    rows = max(1, _MOST // (actual.numel() // actual.shape[0]))
    worst, start = -1.0, 0
    for first in range(0, actual.shape[0], rows):
        length = min(rows, actual.shape[0] - first)
        part = expectation.narrowed(first, length)
        error = (actual.narrow(0, first, length).double() - part.expected.double()).abs()
        # NaN is the largest error of all; 0/0 is not an error.
        use = torch.where(error == 0, 0.0, (error / part.tolerance()).nan_to_num(nan=torch.inf))
        use = torch.where(part.agrees(actual.narrow(0, first, length)), 0.0, use)
        if float(use.amax()) > worst:
            worst, start = float(use.amax()), first
    length = min(rows, actual.shape[0] - start)
    note = f"in the part {start} to {start + length - 1} along dim 0, counted from {start}: "
    return actual.narrow(0, start, length), expectation.narrowed(start, length), note


def _start(place: Place) -> tuple[int, ...] | None:
    """The index at which a block begins, for each dim; None if the place is not a contiguous block."""
    if any(kept[-1] - kept[0] + 1 != len(kept) for kept in place.indices):
        return None
    return tuple(kept[0] for kept in place.indices)
