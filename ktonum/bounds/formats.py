"""Floating-point formats: precision, range, and the largest error of rounding to each.

Sources: IEEE 754-2019 for binary16, 32 and 64; the Open Compute Project's OFP8, revision 1.0 (2023), for the 8-bit
formats. TF32 is the part of a float32 that tensor cores read: 8 bits of exponent and 10 explicit bits of significand.
``tests/bounds/test_formats.py`` compares the figures with those of torch, and rounding with every number of the formats
of 8 and 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BF16", "E4M3", "E5M2", "FORMATS", "FP16", "FP32", "FP64", "TF32", "Format", "spacing"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals, rounded to nearest, ties to even.

    Attributes:
        name: Its key in `FORMATS`.
        digits: p, the bits of the significand, including the hidden bit.
        smallest_exponent: The smallest normal number is 2 to this power.
        largest: The largest finite number.
        infinite: True if larger numbers become infinite, False if they become NaN. Conversions that saturate are not
            modelled.
    """

    name: str
    digits: int
    smallest_exponent: int
    largest: float
    infinite: bool = True

    @property
    def unit_roundoff(self) -> float:
        """u = 2⁻ᵖ: the largest relative error of rounding without under- and overflow. Higham 2002, Theorem 2.2."""
        return 2.0**-self.digits

    @property
    def smallest_normal(self) -> float:
        """The smallest normal number. Below it, the bound on the error of rounding is absolute, not relative."""
        return 2.0**self.smallest_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number: the distance between neighbours below the smallest normal number."""
        return 2.0 ** (self.smallest_exponent - self.digits + 1)

    def half_spacing(self, exact: Tensor) -> Tensor:
        """The largest error of rounding ``exact``: half the distance between neighbours, or infinity on overflow.

        Args:
            exact: Any shape and dtype; it is converted to float64.

        Returns:
            float64, same shape.
        """
        magnitude = exact.double().abs()
        _, exponent = torch.frexp(magnitude.clamp(min=self.smallest_normal))
        half = torch.ldexp(torch.ones_like(magnitude), exponent - self.digits - 1)
        return torch.where(self.round(magnitude).isfinite(), half, math.inf)

    def round(self, exact: Tensor) -> Tensor:
        """``exact`` rounded once to nearest, ties to even, with subnormals and overflow; float64, same shape."""
        values = exact.double()
        if self.digits == FP64.digits:
            return values
        _, exponent = torch.frexp(values.abs().clamp(min=self.smallest_normal))
        rounded = torch.ldexp(torch.ldexp(values, self.digits - exponent).round(), exponent - self.digits)
        beyond = torch.full_like(rounded, math.inf if self.infinite else math.nan).copysign(values)
        return torch.where(rounded.abs() > self.largest, beyond, rounded)


def _ieee(name: str, digits: int, exponent_bits: int) -> Format:
    """A format with w exponent bits: exponents from 2 − 2^(w−1) to 2^(w−1) − 1, the largest significand all ones."""
    bias = 2 ** (exponent_bits - 1) - 1
    return Format(name, digits, 1 - bias, math.ldexp(2.0 - 2.0 ** (1 - digits), bias))


FP64 = _ieee("fp64", 53, 11)
FP32 = _ieee("fp32", 24, 8)
TF32 = _ieee("tf32", 11, 8)
FP16 = _ieee("fp16", 11, 5)
BF16 = _ieee("bf16", 8, 8)
E5M2 = _ieee("e5m2", 3, 5)
# It has no infinities, and only the pattern of all ones is NaN. So it has one exponent more: the largest is 2^8 × 1.75.
E4M3 = Format("e4m3", 4, -6, 448.0, infinite=False)

#: All formats by name.
FORMATS = {f.name: f for f in (FP64, FP32, TF32, FP16, BF16, E4M3, E5M2)}


def spacing(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring ``dtype`` numbers at ``expected``, subnormals included; float64, same shape."""
    info = torch.finfo(dtype)
    # 2^⌊log2 |x|⌋ · eps, but at least the spacing of subnormals. frexp's exponent is one larger than the floor.
    _, exponent = torch.frexp(expected.double().abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(expected, info.eps, dtype=torch.float64), exponent - 1)
