"""The precisions that a function and its derivatives compute in, as the caller said or as dtypes and values show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.gradient_check.contraction import Contraction, carries_float32_only
from ktonum.gradient_check.recorded_call import RecordedCall

__all__ = ["Precisions", "dtype_in_words", "infer_precisions"]

_FLOAT32 = torch.finfo(torch.float32).eps
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}


@dataclass(frozen=True)
class Precisions:
    """The precisions of a checked function.

    Attributes:
        eps: Machine epsilon that fn computes in.
        analytic_eps: Machine epsilon that its derivatives are computed in.
        words: The precision of fn in words.
    """

    eps: float
    analytic_eps: float
    words: str


def infer_precisions(
    contraction: Contraction,
    call: RecordedCall,
    gradients: Sequence[Tensor],
    again: Tensor,
    told: torch.dtype | None,
) -> Precisions:
    """The precisions that the caller told, or those that dtypes and values show.

    Args:
        contraction: The checked function; evaluated once more if its outputs look like float32 values.
        call: The recorded call.
        gradients: Its gradients, float64.
        again: The outputs of a second evaluation at the same point, in one row.
        told: The precision that the caller told, or None.
    """
    if told is not None:
        eps = max(torch.finfo(t).eps for t in (told, *(output.dtype for output in call.outputs)))
        return Precisions(eps, eps, dtype_in_words(told))
    dtypes = [t.dtype for t in (*call.outputs, *(leaf.original for leaf in call.leaves))]
    lowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    eps, words = torch.finfo(lowest).eps, dtype_in_words(lowest)
    if eps >= _FLOAT32:
        return Precisions(eps, eps, words)
    if carries_float32_only(contraction.base, again) and _moves_in_float32(contraction):
        eps, words = _FLOAT32, "float32 (seen in the outputs)"
    analytic = eps
    # A gradient can consist of float32 values by chance: that of a sum weighted by float32 values does. Then it does
    # not when the cotangents have all 53 bits.
    if carries_float32_only(*gradients) and carries_float32_only(
        *call.gradients([c * (4 / 3) for c in call.cotangents])
    ):
        analytic = max(eps, _FLOAT32 / 2.0)
    return Precisions(eps, analytic, words)


def _moves_in_float32(contraction: Contraction) -> bool:
    """Whether the outputs are still float32 values where the inputs are not. A function may only pass them on."""
    directions = {p: leaf.direction(3, p) for p, leaf in enumerate(contraction.function.leaves)}
    moved = contraction.displaced(directions, 2.0**-20)
    return moved is None or carries_float32_only(moved)


def dtype_in_words(dtype: torch.dtype) -> str:
    """The real precision of a dtype, e.g. ``float64`` for ``torch.complex128``."""
    return str(_REAL.get(dtype, dtype)).removeprefix("torch.")
