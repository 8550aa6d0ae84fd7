"""Floating-point formats: precision, range, and what rounding to one may cost.

IEEE 754-2019 for binary16, 32 and 64; the Open Compute Project's OFP8, revision 1.0 (2023), for the 8-bit formats; TF32
is what tensor cores read of a float32, 10 explicit bits behind its 8 of exponent. Of the formats that torch has the
figures are checked against every number of theirs, in ``tests/bounds/test_formats.py``.
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
        name: As it is written here.
        digits: Bits of the significand, the hidden one included: p.
        smallest_exponent: Of the smallest normal number, a power of two.
        largest: The largest finite number.
        infinite: What is larger becomes infinite; else NaN. Conversions that saturate are not these.
    """

    name: str
    digits: int
    smallest_exponent: int
    largest: float
    infinite: bool = True

    @property
    def unit_roundoff(self) -> float:
        """u = 2⁻ᵖ: the largest relative error of rounding, away from under- and overflow. Higham 2002, Theorem 2.2."""
        return 2.0**-self.digits

    @property
    def smallest_normal(self) -> float:
        """Below it the error of rounding is no longer relative."""
        return 2.0**self.smallest_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The distance between neighbours below the smallest normal number."""
        return 2.0 ** (self.smallest_exponent - self.digits + 1)

    def half_spacing(self, exact: Tensor) -> Tensor:
        """The largest error of rounding ``exact``: half the distance of its neighbours, infinite where it overflows.

        Args:
            exact: Any shape; taken in float64.

        Returns:
            float64, of that shape.
        """
        magnitude = exact.double().abs()
        _, exponent = torch.frexp(magnitude.clamp(min=self.smallest_normal))
        half = torch.ldexp(torch.ones_like(magnitude), exponent - self.digits - 1)
        return torch.where(self.round(magnitude).isfinite(), half, math.inf)

    def round(self, exact: Tensor) -> Tensor:
        """``exact`` rounded once, as float64: to nearest, ties to even, with subnormals and overflow."""
        values = exact.double()
        if self.digits == FP64.digits:
            return values
        _, exponent = torch.frexp(values.abs().clamp(min=self.smallest_normal))
        rounded = torch.ldexp(torch.ldexp(values, self.digits - exponent).round(), exponent - self.digits)
        beyond = torch.full_like(rounded, math.inf if self.infinite else math.nan).copysign(values)
        return torch.where(rounded.abs() > self.largest, beyond, rounded)


def _ieee(name: str, digits: int, exponent_bits: int) -> Format:
    """Exponents from 2 − 2^(w−1) to 2^(w−1) − 1, the largest significand all ones."""
    bias = 2 ** (exponent_bits - 1) - 1
    return Format(name, digits, 1 - bias, math.ldexp(2.0 - 2.0 ** (1 - digits), bias))


FP64 = _ieee("fp64", 53, 11)
FP32 = _ieee("fp32", 24, 8)
TF32 = _ieee("tf32", 11, 8)
FP16 = _ieee("fp16", 11, 5)
BF16 = _ieee("bf16", 8, 8)
E5M2 = _ieee("e5m2", 3, 5)
# No infinities: only the all-ones pattern is NaN, and so its exponent range has one more, 2^8 × 1.75.
E4M3 = Format("e4m3", 4, -6, 448.0, infinite=False)

#: By name.
FORMATS = {f.name: f for f in (FP64, FP32, TF32, FP16, BF16, E4M3, E5M2)}


def spacing(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring ``dtype`` numbers at ``expected``, as float64; subnormals included."""
    info = torch.finfo(dtype)
    # 2^⌊log2 |x|⌋ · eps, but at least the subnormal spacing; frexp's exponent is one larger than the floor.
    _, exponent = torch.frexp(expected.double().abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(expected, info.eps, dtype=torch.float64), exponent - 1)
