"""Copies of tensors: private ones of the same layout, and others that are laid out otherwise in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["private_copy", "spaced_out"]


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


def private_copy(tensor: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """A detached copy with the same strides, holding ``values`` if given; contiguous where elements share memory."""
    source = tensor.detach() if values is None else values
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return source.to(tensor.dtype).clone(memory_format=torch.contiguous_format)
        reach += stride * (size - 1)
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(source)
