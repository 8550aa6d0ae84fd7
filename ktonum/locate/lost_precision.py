"""Signatures of lost precision: values rounded or truncated to fewer bits, or sums accumulated in fewer bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ktonum.bounds import confidence
from ktonum.locate.failing_part import Part

__all__ = ["narrow", "rounding_sized", "significant_bits"]

#: Formats by their number of significant bits, fewest first.
_FORMATS = {8: "bf16", 11: "fp16 or tf32", 24: "fp32"}
# Rounding errors are uniform. The mean of fewer than this many says nothing.
_ENOUGH_TO_AVERAGE = 16
# The errors of bf16 and fp16 differ by a factor of 8. An error within this factor of one of them belongs to it.
_NEAR = math.sqrt(8.0)
# A 16-bit tensor may have been summed in 16 bits. A wider tensor has lost precision only with fewer bits than its own.
_SIXTEEN_BIT = 11


def significant_bits(dtype: torch.dtype) -> int:
    """The bits of a dtype's significand, including the leading bit."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def narrow(part: Part) -> str | None:
    """Every element is the right value, rounded or truncated to few bits.

    On average, truncation makes values smaller in magnitude by half a spacing, and rounding to nearest does not change
    them. The mean of n errors that are uniform over one spacing is within λ / √(12 n) spacings of this.
    """
    own = significant_bits(part.dtype)
    usable = (part.expected != 0) & (part.actual != 0)
    count = int(usable.sum())
    if count < _ENOUGH_TO_AVERAGE:
        return None
    actual, expected, tolerance = (t[usable] for t in (part.actual, part.expected, part.tolerance))
    for bits, name in _FORMATS.items():
        if bits > own or not bool((_kept(actual, bits) == actual).all()):
            continue
        unit = _spacing(expected, bits)
        if bits == own:  # the tolerance already includes one rounding to this many bits
            tolerance = (tolerance - unit / 2).clamp(min=0.0)
        short = expected.abs() - actual.abs()
        stray = confidence() / math.sqrt(12 * count)
        mean = float((short / unit).mean())
        if bool((short.abs() <= unit + tolerance).all() & (short >= -tolerance).all()) and abs(mean - 0.5) <= stray:
            return f"truncated to {bits} significant bits ({name}) instead of rounded: {mean:.2f} units too small"
        if bits < own and bool((short.abs() <= unit / 2 + tolerance).all()) and abs(mean) <= stray:
            return f"rounded to {bits} significant bits ({name})"
    return None


def rounding_sized(part: Part) -> str | None:
    """An unbiased error of the size of roundings to few bits, after the tensor's own last rounding is subtracted."""
    norm = float(part.expected.norm())
    if part.count < _ENOUGH_TO_AVERAGE or norm == 0.0:
        return None
    error = part.error
    relative = float(error.norm()) / norm
    bias = abs(float((error * part.expected).sum())) / norm**2
    own = significant_bits(part.dtype)
    relative = math.sqrt(max(0.0, relative**2 - 4.0**-own / 3))
    for bits, name in _FORMATS.items():
        typical = 2.0**-bits / math.sqrt(3)
        if (
            bits < max(own, _SIXTEEN_BIT + 1)
            and typical / _NEAR <= relative <= typical * _NEAR
            and bias <= relative / 2
        ):
            return (
                f"low precision: a relative error of {relative:.2g}, typical of an intermediate or an accumulator with "
                f"{bits} bits ({name})"
            )
    return None


def _spacing(tensor: Tensor, bits: int) -> Tensor:
    """The distance between numbers of so many significant bits at ``tensor``; float64."""
    _, exponent = torch.frexp(tensor)
    return torch.ldexp(torch.ones_like(tensor), exponent - bits)


def _kept(tensor: Tensor, bits: int) -> Tensor:
    """``tensor`` truncated to ``bits`` significant bits."""
    unit = _spacing(tensor, bits)
    return torch.trunc(tensor / unit) * unit
