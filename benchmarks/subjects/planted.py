"""Small faults to plant in tensors and gradients, and the record of a planted defect."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.cases import Point

SIXTEEN_BIT = ("bf16", "fp16")
ALL = ("bf16", "fp16", "fp32", "fp64")

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Defect:
    """A wrong candidate, and the checks that must flag it.

    Attributes:
        name: What is wrong.
        candidate: The wrong candidate.
        point: Where the defect shows.
        flagged_by: Names of the checks that must flag it.
        dtypes: In these, the defect exceeds the rounding errors of a right candidate.
        breaks: Whether the verdict must be ERROR instead of FAIL. A candidate that raises by mistake proves nothing.
    """

    name: str
    candidate: Any
    point: Point
    flagged_by: tuple[str, ...]
    dtypes: tuple[str, ...] = ALL
    breaks: bool = False


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Change) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def with_gradient(tensor: Tensor, change: Change) -> Tensor:
    """``tensor``, whose gradient goes through ``change`` in the backward."""
    changed: Tensor = _Backward.apply(tensor, change)
    return changed


def wide(tensor: Tensor) -> Tensor:
    """In the accumulator's dtype: float64 for float64, else float32. The backward rounds the gradient once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def times(factor: float) -> Change:
    return lambda tensor: tensor * factor


def last_row_zero(tensor: Tensor) -> Tensor:
    """The last row stays zero; a row is along the last dimension."""
    rows = tensor.clone()
    rows.view(-1, rows.shape[-1])[-1] = 0
    return rows


def last_tile_missing(tensor: Tensor) -> Tensor:
    """The last five entries of the first dimension are zero, as if a grid were rounded down."""
    return torch.cat([tensor[:-5], torch.zeros_like(tensor[-5:])])


def tile_unwritten(tensor: Tensor) -> Tensor:
    """The last five entries are what was in fresh memory before."""
    fresh = torch.empty_like(tensor)
    fresh[:-5] = tensor[:-5]
    return fresh


def tile_of_poison(tensor: Tensor) -> Tensor:
    """The same, in memory that holds NaN from an earlier run."""
    return torch.cat([tensor[:-5], torch.full_like(tensor[-5:], torch.nan)])


def truncated_to_bf16(tensor: Tensor) -> Tensor:
    """A store that drops the lower half of float32, as Triton's interpreter does: 0.28 % too small on average."""
    short = (tensor.detach().float().view(torch.int32) & -(2**16)).view(torch.float32)
    return tensor + (short.to(tensor.dtype) - tensor.detach())


def rounded(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def as_if_contiguous(tensor: Tensor) -> Tensor:
    """What a kernel reads if it computes addresses from the shape and ignores the strides."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return tensor.as_strided(tensor.shape, strides) if tensor.dim() else tensor


def reading_past_the_end(tensor: Tensor) -> Tensor:
    """Adds zero times the element behind the last one, as a load does whose mask is applied too late."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    if (tensor.storage_offset() + last) * tensor.element_size() >= tensor.untyped_storage().nbytes():
        return tensor
    return tensor + 0 * tensor.detach().as_strided((), (), tensor.storage_offset() + last)


class DriftingUlp:
    """Each call moves every element by one more unit in the last place, so that no two runs agree."""

    def __init__(self) -> None:
        self._calls = itertools.count()

    def __call__(self, tensor: Tensor) -> Tensor:
        moved = tensor.detach()
        for _ in range(next(self._calls)):
            moved = torch.nextafter(moved, torch.full_like(moved, torch.inf))
        return tensor + (moved - tensor.detach())


class SummedInLowPrecision(torch.autograd.Function):
    """A weight that is used ``copies`` times. Its gradients are added up one by one in bfloat16."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copies: int) -> Tensor:
        return weight.expand(copies, *weight.shape)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None]:
        total = torch.zeros_like(gradients[0], dtype=torch.bfloat16)
        for gradient in gradients:
            total += gradient.to(torch.bfloat16)
        return total.to(gradients.dtype), None
