"""Signatures of wrong constants and terms: scaled, shifted, clipped, without sign, or a known tensor added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from ktonum.bounds import confidence
from ktonum.bounds.formats import spacing
from ktonum.locate.failing_part import Part, fits

__all__ = [
    "another_tensor",
    "clipped",
    "missing",
    "named_constants",
    "scaled",
    "scaled_by_slices",
    "shifted",
    "superfluous",
    "without_sign",
]

# The fewest elements for each fitted coefficient. Fewer can be explained by chance.
_PER_COEFFICIENT = 4
# If more names than this fit a constant, none is given.
_MOST_NAMES = 3


def named_constants(value: float, uncertainty: float, sizes: Mapping[str, float]) -> tuple[str, ...]:
    """Names that fit a constant: small fractions, powers of two, and fractions of a case's sizes and parameters."""
    found = [name for name, number in _constants(sizes) if abs(value - number) <= uncertainty]
    names = tuple(dict.fromkeys(found))
    return names if len(names) <= _MOST_NAMES else ()


def _constants(sizes: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for number, name in ((2.0, "2"), (0.5, "1/2"), (1.5, "3/2"), (4.0, "4"), (0.25, "1/4")):
        yield name, number
    for exponent in (*range(-16, -2), *range(3, 17)):
        yield f"2^{exponent}", 2.0**exponent
    for name, size in sizes.items():
        if size in (0.0, 1.0, -1.0):
            continue
        yield name, size
        yield f"1/{name}", 1 / size
        if float(size).is_integer() and size > 1:
            yield f"{name}/({name} + 1)", size / (size + 1)
            yield f"{name}/({name} - 1)", size / (size - 1)
            yield f"({name} + 1)/{name}", (size + 1) / size
            yield f"({name} - 1)/{name}", (size - 1) / size


def missing(part: Part) -> str | None:
    """Every exceeding element is zero."""
    there = part.exceeding
    if bool(there.any()) and not bool(part.actual[there].any()):
        return "missing: zero instead of the expected values"
    return None


def superfluous(part: Part) -> str | None:
    """All expected values are zero."""
    if bool(part.exceeding.any()) and not bool(part.expected.any()):
        return f"something where zero should be, up to {float(part.error.abs().amax()):.3g}"
    return None


def scaled(part: Part) -> str | None:
    """The expected values times a constant."""
    norm = float(part.expected.square().sum())
    if norm == 0.0:
        return None
    factor = float((part.actual * part.expected).sum()) / norm
    if abs(factor) == 0.0 or not fits(part, factor * part.expected):
        return None
    roundings = part.tolerance + spacing(part.actual, part.stored).view(part.actual.shape) / 2
    by_element = roundings * part.expected.abs() / norm
    uncertainty = min(float(by_element.sum()), confidence() * float(by_element.norm()))
    if abs(factor) <= uncertainty:
        return "missing: nearly zero instead of the expected values"
    if abs(factor + 1) <= uncertainty:
        return "sign flipped"
    if part.count == 1:
        found = f"{float(part.actual.sum()):.6g} instead of {float(part.expected.sum()):.6g}"
        found += f": off by {float(part.error.sum()):.3g}"
        # A factor that is 1 to six digits is not worth a name.
        return found if f"{factor:.6g}" == "1" else f"{found}, or {_times(factor, uncertainty, part.sizes)}"
    return _times(factor, uncertainty, part.sizes)


def _times(factor: float, uncertainty: float, sizes: Mapping[str, float]) -> str:
    names = named_constants(factor, uncertainty, sizes)
    negative = () if names else named_constants(-factor, uncertainty, sizes)
    called = " or ".join(names) or " or ".join(f"-{name}" for name in negative)
    number = f"{factor:.4g}" if called else f"{factor:.6g}"
    return f"scaled by {called} = {number}" if called not in ("", number) else f"scaled by {number}"


def scaled_by_slices(part: Part) -> str | None:
    """Each slice along a dim times its own constant, for example a coefficient that is wrong for each sequence."""
    for dim, size in enumerate(part.actual.shape):
        if size < 2 or part.count < _PER_COEFFICIENT * size:
            continue
        over = [d for d in range(part.actual.dim()) if d != dim]
        norms = part.expected.square().sum(over, keepdim=True)
        factors = (part.actual * part.expected).sum(over, keepdim=True) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        if fits(part, factors * part.expected):
            low, high = float(factors.amin()), float(factors.amax())
            return f"each index along dim {dim} scaled by a factor of its own, from {low:.3g} to {high:.3g}"
    return None


def shifted(part: Part) -> str | None:
    """The expected values plus a constant."""
    if part.count < _PER_COEFFICIENT:
        return None
    shift = float(part.error.mean())
    if shift == 0.0 or not fits(part, part.expected + shift):
        return None
    return f"shifted by {shift:.6g}"


def clipped(part: Part) -> str | None:
    """All exceeding elements have the same magnitude, and the expected values are larger."""
    there = part.exceeding
    if int(there.sum()) < 2:
        return None
    actual, expected = part.actual[there], part.expected[there]
    magnitude = actual.abs()
    limit = float(magnitude[0])
    if limit > 0 and bool((magnitude == limit).all() & (actual * expected > 0).all() & (expected.abs() > limit).all()):
        return f"clipped at {limit:.6g} in magnitude"
    return None


def without_sign(part: Part) -> str | None:
    """The magnitudes of the expected values."""
    return "without its sign: the magnitudes of the expected values" if fits(part, part.expected.abs()) else None


def biased(part: Part) -> str | None:
    """Errors of the size of rounding errors that do not average out: their mean exceeds λ of its standard errors."""
    norm = float(part.expected.square().sum())
    if part.count < 2 or norm == 0.0:
        return None
    bias = float((part.error * part.expected).sum()) / norm
    left = part.error - bias * part.expected
    known = abs(bias) > confidence() * float((left * part.expected).norm()) / norm
    if not known or float(left.norm()) > float(part.tolerance.norm()):
        return None
    return f"too {'long' if bias > 0 else 'short'} by {abs(bias):.2g} of its size on average, besides rounding errors"


def another_tensor(part: Part) -> str | None:
    """The error is a multiple of another tensor of the run: a term is missing, or there is one too many."""
    if part.count < 2 * _PER_COEFFICIENT:
        return None
    error = part.error
    for name, other in part.others.items():
        if other.shape != error.shape:
            continue
        other = other.double()
        norm = float(other.square().sum())
        if norm == 0.0 or not math.isfinite(norm):
            continue
        factor = float((error * other).sum()) / norm
        if factor != 0.0 and fits(part, part.expected + factor * other):
            return f"one term {'missing' if factor < 0 else 'too much'}: the error is {factor:.6g} times {name}"
    return None
