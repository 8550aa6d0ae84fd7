"""Log-probabilities of sequences under one head, on plain tensors.

Their gradients are in `ktonum.kernels.step.sequence_gradients`, the order of several heads in
`ktonum.kernels.step.forward_passes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.device.hardware import slab_dtype
from ktonum.kernels.device.logits.launch import Projection
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.device.slabs import SlabPlan
from ktonum.kernels.device.statistics import launch

__all__ = ["Head", "SequenceSums", "Storage", "projection", "sequence_sums"]


@dataclass(frozen=True)
class Head:
    """Hidden states, the projection to logits, and the targets that are scored.

    Attributes:
        input: (B, T, H), any strides.
        weight: (V, H), any strides, dtype of ``input``.
        bias: (V,) or None.
        target: (B, T), int64.
        ignore_index: Marks masked tokens.
        allow_tf32: Let float32 products run in TF32.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    allow_tf32: bool


@dataclass(frozen=True)
class Storage:
    """Where a forward keeps exponentials for its backward, see `ktonum.kernels.device.slabs`.

    Attributes:
        workspace: How many numbers they may be in memory of their own.
        in_gradient: Whether the forward also makes the memory of the weight's gradient and keeps some there, which one
            backward can then use.
    """

    workspace: int = 0
    in_gradient: bool = False


@dataclass(frozen=True)
class SequenceSums:
    """What a forward gives, all float64 unless said otherwise.

    Attributes:
        logps: Sums of the unmasked tokens' log-probabilities, (B,).
        statistics: The fields of `launch.RowStatistics` of the packed rows, (4, B·T); undefined behind them.
        packing: Which rows those are.
        exponentials: Stored for the backward, flat, laid out by `SlabPlan`; empty if none are.
        gradient: The memory of the weight's gradient with further ones, (V, H); None if it holds none.
    """

    logps: Tensor
    statistics: Tensor
    packing: Packing
    exponentials: Tensor
    gradient: Tensor | None = None


def sequence_sums(head: Head, packing: Packing, storage: Storage | None = None) -> SequenceSums:
    """The forward under one head.

    Args:
        head: See there.
        packing: Of its targets.
        storage: For the exponentials that a backward needs; None if there is none, and masked rows need no result.
    """
    weight, target, limit = head.weight, head.target, packing.limit if storage is None else None
    scored, storage = projection(head, packing, limit), storage or Storage()
    dtype = slab_dtype(weight.dtype)
    exponentials = torch.empty(storage.workspace, dtype=dtype, device=weight.device)
    plan = SlabPlan.of(
        packing.count,
        weight.shape[0],
        storage.workspace,
        hidden=weight.shape[1],
        in_gradient=storage.in_gradient and dtype == weight.dtype,
    )
    gradient = torch.empty(weight.shape, dtype=dtype, device=weight.device) if plan.in_gradient else None
    statistics = torch.empty(4, target.numel(), dtype=torch.float64, device=weight.device)
    rows = launch.RowStatistics(*statistics[:, : packing.count].unbind())
    launch.row_statistics(scored, rows, slabs=plan.stored(exponentials, gradient))
    logps = packing.sum_by_sequence(rows.logps)
    return SequenceSums(logps, statistics, packing, exponentials, gradient)


def projection(head: Head, packing: Packing, limit: Tensor | None = None) -> Projection:
    """The rows to score."""
    x, y = packing.pack(head.input)
    bias = None if head.bias is None else head.bias.contiguous()
    return Projection(x, head.weight, bias, y, head.allow_tf32, limit)
