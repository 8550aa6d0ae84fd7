"""Inputs of other strides give the same results: spaced out in memory, between NaN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.context import CaseContext
from ktonum.evaluation import Run
from ktonum.probe import Probe

__all__ = ["CHECK", "spaced_out"]


def spaced_out(tensor: Tensor) -> Tensor:
    """The same values with every stride doubled, an offset, and NaN (or the largest integer) in between.

    A kernel that assumes contiguous rows, or that reads past its inputs, meets the poison.
    """
    poison: Any = math.nan if tensor.is_floating_point() else tensor.dtype == torch.bool
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        poison = torch.iinfo(tensor.dtype).max
    room = torch.full([2 * n + 1 for n in tensor.shape], poison, dtype=tensor.dtype, device=tensor.device)
    view = room[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def _probes(context: CaseContext) -> list[Probe]:
    inputs = {k: spaced_out(v) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in context.inputs.items()}
    if all(inputs[k] is v for k, v in context.inputs.items()):
        raise Inapplicable("no input has a dimension to be strided along")
    actual = context.evaluate(Run(inputs, context.parameters, context.upstream)).tensors()
    return held_to_bounds(context, actual=actual, expected=context.result.tensors(), scale=2.0)


CHECK = Check("strided", "strided and offset inputs give the same results as contiguous ones", _probes)
