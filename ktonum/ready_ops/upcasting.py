"""The candidate ``upcast`` of every ready op: its reference in float32, rounded once.

It meets `precise` by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.evaluation import upcast

__all__ = ["rounded_once"]


def rounded_once(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``reference`` in float32 (float64 for float64 inputs), rounded to the dtype of the first floating input."""

    def candidate(**inputs: Any) -> Tensor:
        given = next(v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
        return reference(**upcast(inputs, torch.promote_types(given, torch.float32))).to(given)

    return candidate
