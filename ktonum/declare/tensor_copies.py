"""Copies of tensors: private copies with the same strides, and copies with another layout in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["private_copy", "spaced_out"]


def spaced_out(tensor: Tensor) -> Tensor:
    """A view of the same values with gaps between them and an offset. The gaps hold NaN, the largest integer or True.

    A kernel that assumes contiguous rows, or reads beyond its inputs, reads these values.
    """
    poison: Any = math.nan if tensor.is_floating_point() or tensor.is_complex() else tensor.dtype == torch.bool
    if isinstance(poison, bool) and tensor.dtype != torch.bool:
        poison = torch.iinfo(tensor.dtype).max
    room = torch.full([2 * n + 1 for n in tensor.shape], poison, dtype=tensor.dtype, device=tensor.device)
    view = room[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def private_copy(tensor: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """A detached copy with the same strides and dtype; it is contiguous if elements of ``tensor`` share memory.

    Args:
        tensor: The tensor whose strides and dtype are copied.
        values: The values of the copy, same shape; by default those of ``tensor``.
    """
    source = tensor.detach() if values is None else values
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return source.to(tensor.dtype).clone(memory_format=torch.contiguous_format)
        reach += stride * (size - 1)
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(source)
