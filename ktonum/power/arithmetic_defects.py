"""Defects of arithmetic: a store that truncates, or a format or an accumulator that is too narrow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ktonum.declare.cases import dtype_name
from ktonum.measure.comparison import blocks
from ktonum.power.defect import Defect, Sound, changed_elements, signs

__all__ = ["ACCUMULATED", "ROUNDED", "TRUNCATED"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# TF32 has 11 bits of significand, this many fewer than float32.
_LOST_IN_TF32 = 13
# The number of terms that are added up. It is small, because the error grows with it.
_TERMS = 16
#: For each dtype, the too narrow accumulator of a defective kernel.
_NARROW = {
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
    torch.float32: torch.bfloat16,
    torch.float64: torch.float32,
}


def _truncated(sound: Sound) -> Tensor | None:
    """Elements that were rounded away from zero become one unit in the last place smaller in magnitude.

    If the expected values are wider than the tensor, they show which elements these are. Otherwise half of the elements
    are changed. None if the tensor is not floating or has no single expected tensor.
    """
    tensor, expected = sound.actual, sound.expected
    bits = _BITS.get(tensor.dtype.itemsize)
    if not sound.floating or expected is None or bits is None:
        return None
    planted = sound.copy()
    for start, (block, wide) in blocks(planted, expected):
        if expected.dtype.itemsize > tensor.dtype.itemsize:
            away = block.abs() > wide.abs()
        else:
            away = signs(start, block.numel(), block.device) > 0
        # The bits are sign and magnitude, so one less is the next number towards zero.
        block.view(bits).sub_((away & (block != 0) & ~block.isnan()).to(bits))
    return planted


def _to_tf32(block: Tensor) -> Tensor:
    """Round to TF32, to nearest, ties to even: add half a unit, less one bit if the last kept bit is zero; then cut."""
    bits = block.float().view(torch.int32)
    bits = bits + ((1 << (_LOST_IN_TF32 - 1)) - 1) + ((bits >> _LOST_IN_TF32) & 1)
    return (bits & -(1 << _LOST_IN_TF32)).view(torch.float32)


def _rounded(source: torch.dtype, words: str, change: Callable[[Tensor], Tensor]) -> Defect:
    """Numbers of dtype ``source`` that were rounded to a narrower format."""

    def plant(sound: Sound) -> Tensor | None:
        usable = sound.floating and sound.actual.dtype == source
        return changed_elements(sound.actual, lambda block, start: change(block)) if usable else None

    return Defect(f"rounded to {words}", plant)


def _accumulated(narrow: torch.dtype) -> Defect:
    """Each element is divided into equal terms, which are added one by one in ``narrow``."""

    def sum_of(block: Tensor) -> Tensor:
        total = torch.zeros_like(block, dtype=narrow)
        for _ in range(_TERMS):
            total = (total.double() + block / _TERMS).to(narrow)
        return total

    def plant(sound: Sound) -> Tensor | None:
        usable = sound.floating and _NARROW.get(sound.actual.dtype) == narrow
        return changed_elements(sound.actual, lambda block, start: sum_of(block)) if usable else None

    return Defect(f"added up in {dtype_name(narrow)}", plant)


TRUNCATED = Defect("truncated", _truncated)
#: Rounding of each dtype to the next narrower format.
ROUNDED = (
    _rounded(torch.float16, "bf16", lambda block: block.to(torch.bfloat16)),
    _rounded(torch.float32, "TF32", _to_tf32),
    _rounded(torch.float64, "fp32", lambda block: block.float()),
)
ACCUMULATED = tuple(_accumulated(narrow) for narrow in dict.fromkeys(_NARROW.values()))
