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
from ktonum.kernels.device.slabs import SlabPlan, Workspace, stored_size
from ktonum.kernels.device.statistics import launch

__all__ = ["Head", "SequenceSums", "Storage", "projection", "sequence_sums", "stored_numbers"]


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
        workspace: How many numbers it may keep in memory of their own.
        in_gradient: Whether the forward also allocates the memory of the weight's gradient and keeps some numbers
            there. One backward can use these.
    """

    workspace: int = 0
    in_gradient: bool = False


@dataclass(frozen=True)
class SequenceSums:
    """The results of a forward under one head, float64 unless said otherwise.

    Attributes:
        logps: Sums of the unmasked tokens' log-probabilities, (B,).
        statistics: The fields of `launch.RowStatistics` of the packed rows, (4, B·T). What lies behind those rows is
            not defined.
        packing: Which rows those are.
        exponentials: Stored for the backward, flat, as `SlabPlan` lays them out; empty if none are stored.
        gradient: The memory of the weight's gradient, with further exponentials, (V, H); None if it has none.
    """

    logps: Tensor
    statistics: Tensor
    packing: Packing
    exponentials: Tensor
    gradient: Tensor | None = None


def stored_numbers(weight: Tensor, target: Tensor, workspace: Workspace) -> int:
    """How many exponentials a forward stores in its workspace.

    All tokens count, masked ones too: a compiled graph must know the sizes of its outputs before it runs.

    Args:
        weight: (V, H).
        target: (B, T).
        workspace: See there.
    """
    return stored_size(target.numel(), weight.shape[0], slab_dtype(weight.dtype).itemsize, workspace)


def sequence_sums(head: Head, packing: Packing, storage: Storage | None = None) -> SequenceSums:
    """The forward under one head.

    Args:
        head: See there.
        packing: Of the head's targets.
        storage: For the exponentials that a backward needs. None if no backward follows; masked rows then need no
            result.
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
    """The head and the rows that it scores."""
    x, y = packing.pack(head.input)
    bias = None if head.bias is None else head.bias.contiguous()
    return Projection(x, head.weight, bias, y, head.allow_tf32, limit)
