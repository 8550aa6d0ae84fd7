"""Log-probabilities of sequences under one head, on plain tensors.

Their gradients are in `ktonum.kernels.sequence_gradients`, the order of several heads in `ktonum.kernels.passes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels import hardware, launch
from ktonum.kernels.packing import Packing
from ktonum.kernels.slabs import SlabPlan

__all__ = ["Head", "SequenceSums", "contiguous", "sequence_sums"]


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
class SequenceSums:
    """What a forward gives, all float64 unless said otherwise.

    Attributes:
        logps: Sums of the unmasked tokens' log-probabilities, (B,).
        statistics: The fields of `launch.RowStatistics` of the packed rows, (3, B·T); undefined behind them.
        packing: Which rows those are.
        exponentials: Stored for the backward, flat, laid out by `SlabPlan`; empty if none are.
    """

    logps: Tensor
    statistics: Tensor
    packing: Packing
    exponentials: Tensor


def sequence_sums(head: Head, packing: Packing, *, store: int = 0) -> SequenceSums:
    """The forward under one head.

    Args:
        head: See there.
        packing: Of its targets.
        store: How many numbers the exponentials that are kept for a backward may be.
    """
    input, weight, target = head.input, head.weight, head.target
    x, y = packing.pack(input, target)
    exponentials = torch.empty(store, dtype=hardware.slab_dtype(input.dtype), device=input.device)
    slab = SlabPlan.of(packing.count, weight.shape[0], store).stored(exponentials)
    statistics = torch.empty(3, target.numel(), dtype=torch.float64, device=input.device)
    rows = launch.RowStatistics(*statistics[:, : packing.count])
    launch.row_statistics(x, weight, contiguous(head.bias), y, rows, slab=slab, allow_tf32=head.allow_tf32)
    logps = packing.sum_by_sequence(rows.logps, target, head.ignore_index)
    return SequenceSums(logps, statistics, packing, exponentials)


def contiguous(bias: Tensor | None) -> Tensor | None:
    """``bias``, contiguous."""
    return None if bias is None else bias.contiguous()
