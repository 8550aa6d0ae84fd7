"""Describes an error by the first known pattern that explains it."""

from __future__ import annotations

from collections.abc import Callable

from ktonum.locate.failing_part import Part
from ktonum.locate.lost_precision import narrow, rounding_sized
from ktonum.locate.misplaced_values import misplaced, repeated
from ktonum.locate.wrong_constants import (
    another_tensor,
    biased,
    clipped,
    missing,
    scaled,
    scaled_by_slices,
    shifted,
    superfluous,
    without_sign,
)

__all__ = ["look_of"]

#: The patterns in the order in which they are tried, simplest first.
_SIGNATURES: tuple[Callable[[Part], str | None], ...] = (
    missing,
    superfluous,
    narrow,
    scaled,
    clipped,
    without_sign,
    shifted,
    repeated,
    misplaced,
    another_tensor,
    scaled_by_slices,
    biased,
    rounding_sized,
)

_OF_INTEGERS = tuple(s for s in _SIGNATURES if s not in (narrow, biased, rounding_sized))


def look_of(part: Part) -> str:
    """A description of a part's error. If no pattern explains it: its norm, its bias and the largest error."""
    finite = part.actual.isfinite() & part.expected.isfinite()
    if not bool(finite.all()):
        return _not_finite(part)
    floating = part.dtype.is_floating_point
    for signature in _SIGNATURES if floating else _OF_INTEGERS:
        found = signature(part)
        if found is not None:
            return found
    return _no_pattern(part)


def _not_finite(part: Part) -> str:
    counts = [
        (int((mask & part.exceeding).sum()), words)
        for mask, words in (
            (part.actual.isnan(), "NaN"),
            (part.actual.isposinf(), "infinity"),
            (part.actual.isneginf(), "minus infinity"),
            (part.actual.isfinite() & ~part.expected.isfinite(), "a finite number instead of NaN or infinity"),
        )
    ]
    found = [f"{words} in {count} of {part.count} elements" for count, words in counts if count]
    unwritten = ": unwritten memory, or an invalid operation" if counts[0][0] else ""
    return (" and ".join(found) or "not finite") + unwritten


def _no_pattern(part: Part) -> str:
    norm = float(part.expected.norm())
    error = part.error
    largest = float(error.abs().amax()) if part.count else 0.0
    size = f"relative norm {float(error.norm()) / norm:.3g}" if norm > 0 else f"norm {float(error.norm()):.3g}"
    bias = f", signed bias {float((error * part.expected).sum()) / norm**2:.3g}" if norm > 0 else ""
    return f"no known pattern: {size}{bias}, largest error {largest:.3g}"
