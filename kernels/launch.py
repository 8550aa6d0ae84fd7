"""Launching the logits kernels on plain (rows, hidden) tensors; nothing here knows of sequences, autograd or KTO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ktonum.kernels.block_sizes import BlockSizes, block_sizes
from ktonum.kernels.hardware import (
    ACCUMULATORS,
    INTERPRETED,
    capability,
    programs,
    serves_descriptors,
    slab_scale,
)
from ktonum.kernels.logits_kernels import LOG2_E, logits_kernel
from ktonum.kernels.products import accumulator_dtype
from ktonum.kernels.row_kernels import (
    column_sums_kernel,
    count_targets_kernel,
    reduce_tiles_kernel,
    rescale_slab_kernel,
    target_logits_kernel,
)

__all__ = ["RowStatistics", "column_sums", "count_targets", "exponentials", "row_statistics"]

# What tensor cores lose of an inner product of n terms, as a multiple of n: on an H100 log-sum-exps of bf16 logits at
# hidden size 4096 were short by 3.8e-6 to 4.1e-6 of E_p z on data of mean zero, with outlier dimensions, of mean 0.5
# and with peaked softmaxes alike, and products over 32,768 and 151,936 terms by 3.1e-5 and 1.48e-4. (Where every term
# has one sign it is three times as much.)
_TRUNCATION = 9.6e-10


@dataclass(frozen=True)
class RowStatistics:
    """What a forward keeps of each row, (N,) and float64 each.

    Attributes:
        logps: log π(y_t).
        shift: s_t, exact in the accumulator's dtype: exponentials are e_tv = 2^(z_tv log₂ e − s_t), times `slab_scale`.
        factor: f_t: p_tv = f_t e_tv.
    """

    logps: Tensor
    shift: Tensor
    factor: Tensor


def _logit_scale(hidden: int, device: torch.device, blocks: BlockSizes) -> float:
    """log₂ e, and what makes up for truncation where a product is not promoted."""
    corrected = blocks.descriptors and not INTERPRETED
    return float(LOG2_E.value) * (1 + _TRUNCATION * hidden * corrected)


def _launch_logits(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    shift: Tensor,
    columns: tuple[int, int],
    *,
    allow_tf32: bool,
    tile_shift: Tensor | None = None,
    tile_sum: Tensor | None = None,
    slab: Tensor | None = None,
) -> None:
    """`logits_kernel` over the columns [first, last); with statistics if their tensors are given."""
    rows, hidden = input.shape
    first, last = columns
    blocks = _blocks(input, weight, slab)
    tiles = triton.cdiv(rows, blocks.rows) * triton.cdiv(last - first, blocks.columns)
    operands: tuple[Any, Any, Any] = (input, weight, input if slab is None else slab)
    if blocks.descriptors:
        operands = (
            TensorDescriptor.from_tensor(input, [blocks.rows, blocks.hidden]),
            TensorDescriptor.from_tensor(weight, [blocks.columns, blocks.hidden]),
            # Half a tile's columns, as the kernel stores them.
            TensorDescriptor.from_tensor(operands[2], [blocks.rows, blocks.columns // 2]),
        )
    logits_kernel[(programs(input.device, tiles, persistent=blocks.descriptors),)](
        *operands,
        weight if bias is None else bias,
        target,
        shift,
        shift if tile_shift is None else tile_shift,
        shift if tile_sum is None else tile_sum,
        row_count=rows,
        first_column=first,
        column_count=last - first,
        hidden=hidden,
        scale=_logit_scale(hidden, input.device, blocks),
        stride_input_row=input.stride(0),
        stride_input_hidden=input.stride(1),
        stride_weight_row=weight.stride(0),
        stride_weight_hidden=weight.stride(1),
        stride_slab_row=0 if slab is None else slab.stride(0),
        DESCRIPTORS=blocks.descriptors,
        HAS_BIAS=bias is not None,
        STATISTICS=tile_shift is not None,
        STORE=slab is not None,
        TILE_RELATIVE=slab is not None and input.dtype == torch.float16,
        SLAB_SCALE=slab_scale(input.dtype),
        EVEN_HIDDEN=hidden % blocks.hidden == 0,
        UPCAST=INTERPRETED and input.dtype == torch.bfloat16,
        ACCUMULATOR=ACCUMULATORS[accumulator_dtype(input.dtype)],
        PRECISION="tf32" if allow_tf32 and input.dtype == torch.float32 else "ieee",
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_HIDDEN=blocks.hidden,
        PROMOTE=blocks.promote,
        GROUP=blocks.group,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _blocks(input: Tensor, weight: Tensor, slab: Tensor | None) -> BlockSizes:
    descriptors = serves_descriptors(input, weight) and (slab is None or serves_descriptors(input, slab))
    return block_sizes(
        input.dtype,
        capability=capability(input.device),
        interpreted=INTERPRETED,
        descriptors=descriptors,
        stored=slab is not None,
    )


def row_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: RowStatistics,
    *,
    slab: Tensor | None,
    allow_tf32: bool,
) -> None:
    """log softmax(x Wᵀ + b) at the target of each row, and what exponentials of the row are relative to.

    Args:
        input: x, (N, H), any strides.
        weight: W, (V, H), any strides, dtype of ``input``.
        bias: b, (V,), contiguous, or None.
        target: (N,), int64, contiguous; values outside [0, V) count as a logit of 0 beside all others, to be masked.
        statistics: Written.
        slab: Filled with the exponentials of the first C columns, as `exponentials` would, (N, C), of `slab_dtype`; C
            is V or a multiple of 256. None to store nothing.
        allow_tf32: Let float32 products run in TF32.
    """
    rows, vocabulary = input.shape[0], weight.shape[0]
    if rows == 0:
        return
    wide = accumulator_dtype(input.dtype)
    logit = torch.empty(rows, dtype=torch.float64, device=input.device)
    target_shift = torch.empty(rows, dtype=wide, device=input.device)
    block_rows = 64 if INTERPRETED else 8
    target_logits_kernel[(triton.cdiv(rows, block_rows),)](
        input,
        weight,
        weight if bias is None else bias,
        target,
        logit,
        target_shift,
        row_count=rows,
        vocabulary=vocabulary,
        hidden=input.shape[1],
        stride_input_row=input.stride(0),
        stride_input_hidden=input.stride(1),
        stride_weight_row=weight.stride(0),
        stride_weight_hidden=weight.stride(1),
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=256,
    )
    width = _blocks(input, weight, slab).columns
    tile_shift = torch.empty((triton.cdiv(vocabulary, width), rows), dtype=wide, device=input.device)
    tile_sum = torch.empty_like(tile_shift)
    stored = 0 if slab is None else slab.shape[1]
    for columns, kept in (((0, stored), slab), ((stored, vocabulary), None)):
        if columns[0] < columns[1]:
            _launch_logits(
                input,
                weight,
                bias,
                target,
                target_shift,
                columns,
                allow_tf32=allow_tf32,
                tile_shift=tile_shift,
                tile_sum=tile_sum,
                slab=kept,
            )
    reduce_rows = 128 if INTERPRETED else 32
    reduce_tiles_kernel[(triton.cdiv(rows, reduce_rows),)](
        tile_shift,
        tile_sum,
        logit,
        target_shift,
        statistics.logps,
        statistics.shift,
        statistics.factor,
        row_count=rows,
        tile_count=tile_shift.shape[0],
        TILE_RELATIVE=input.dtype == torch.float16,
        SLAB_SCALE=slab_scale(input.dtype),
        BLOCK_ROWS=reduce_rows,
        BLOCK_TILES=32,
    )
    if slab is not None:
        _rescale(slab, tile_shift, statistics.shift, width)


def exponentials(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    shift: Tensor,
    *,
    slab: Tensor,
    first_column: int,
    allow_tf32: bool,
) -> None:
    """Fill ``slab`` with `slab_scale` · e_tv for the columns v from ``first_column`` on, 0 at the targets.

    Args:
        input, weight, bias, target, allow_tf32: As for `row_statistics`.
        shift: From there, (N,), float64.
        slab: (N, columns), of `slab_dtype`, hidden stride 1.
        first_column: First vocabulary entry of the slab.
    """
    columns = (first_column, first_column + slab.shape[1])
    _launch_logits(input, weight, bias, target, shift, columns, allow_tf32=allow_tf32, slab=slab)


def _rescale(slab: Tensor, tile_shift: Tensor, shift: Tensor, width: int) -> None:
    rows, columns = slab.shape
    block_rows = 128 if INTERPRETED else 256
    rescale_slab_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(columns, width))](
        slab,
        tile_shift,
        shift,
        row_count=rows,
        column_count=columns,
        stride_slab_row=slab.stride(0),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=width,
        ROWS_AT_A_TIME=128 if INTERPRETED else 32,
    )


def count_targets(target: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """How many targets, int64, are unmasked, and how many of those are outside the vocabulary: (2,), int64."""
    counts = torch.empty(2, dtype=torch.int64, device=target.device)
    target = target.contiguous()
    count_targets_kernel[(1,)](
        target, counts, count=target.numel(), vocabulary=vocabulary, ignore_index=ignore_index, BLOCK=2048, num_warps=8
    )
    return counts


def column_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v w_v, (H,), and max |w|, a scalar; float64, not finite where the weight, (V, H), is not."""
    rows, hidden = weight.shape
    stretches, block_rows, block_hidden = (1, 1024, 256) if INTERPRETED else (64, 16, 256)
    shape = (stretches, hidden)
    sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
    largest = torch.empty_like(sums, dtype=accumulator_dtype(weight.dtype))
    column_sums_kernel[(stretches, triton.cdiv(hidden, block_hidden))](
        weight,
        sums,
        largest,
        row_count=rows,
        rows_each=triton.cdiv(rows, stretches),
        hidden=hidden,
        stride_weight_row=weight.stride(0),
        stride_weight_hidden=weight.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=block_hidden,
    )
    return sums.sum(0), largest.amax().double()
