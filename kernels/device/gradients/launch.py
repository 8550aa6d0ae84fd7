"""Launching the gradient kernels on plain tensors: a slab of exponentials, hidden states, the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ktonum.kernels.device.block_sizes import WEIGHT_GRADIENT, cdiv
from ktonum.kernels.device.gradients.kernels import (
    add_target_terms_kernel,
    bias_gradient_kernel,
    finish_input_gradient_kernel,
    stretch_bounds_kernel,
    weight_gradient_kernel,
)
from ktonum.kernels.device.hardware import ACCUMULATORS, INTERPRETED, programs, serves_descriptors
from ktonum.kernels.device.products import accumulator_dtype, product
from ktonum.kernels.device.slabs import Slab
from ktonum.kernels.device.sums.launch import Coefficients
from ktonum.kernels.device.trace import note

__all__ = ["WIDE_ROWS", "Rows", "SortedTargets", "bias_gradient", "input_gradient", "weight_gradient"]

#: How many rows of the weight's gradient exist in the accumulator's dtype at a time: 128 MiB at hidden size 4096.
WIDE_ROWS = 8192
# How many vocabulary entries share a bound of `SortedTargets`.
_STRETCH = WEIGHT_GRADIENT.columns


@dataclass(frozen=True)
class SortedTargets:
    """The rows by target, so that sums over the rows of one target need no atomics.

    Attributes:
        target: Sorted, (N,), int32.
        order: The row that each target came from, (N,), int64; rows of one target are in their own order.
        bounds: Where the targets of each stretch of the vocabulary begin, and where those of the last one end.
    """

    target: Tensor
    order: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, target: Tensor, vocabulary: int) -> SortedTargets:
        """Sort ``target``, (N,)."""
        # In 32 bits, because sorting takes a pass for each byte.
        in_order, order = torch.sort(target.int(), stable=True)
        stretches = cdiv(vocabulary, _STRETCH)
        bounds = torch.empty(stretches + 1, dtype=torch.int64, device=target.device)
        block = 1024 if INTERPRETED else 128
        stretch_bounds_kernel[(cdiv(stretches + 1, block),)](
            in_order,
            bounds,
            count=len(target),
            stretches=stretches,
            vocabulary=vocabulary,
            steps=len(target).bit_length(),
            STRETCH=_STRETCH,
            BLOCK=block,
        )
        note("stretch_bounds_kernel", in_order.dtype, rows=len(target), columns=vocabulary)
        return cls(in_order, order, bounds)


@dataclass(frozen=True)
class Rows:
    """What the gradients need from each token.

    Attributes:
        input: x, (N, H), any strides.
        target: y, (N,), int64, contiguous.
        targets: The rows by target.
        coefficients: How much it counts.
    """

    input: Tensor
    target: Tensor
    targets: SortedTargets
    coefficients: Coefficients


def weight_gradient(grad_rows: Tensor, slab: Slab, rows: Rows, weighted_input: Tensor) -> None:
    """``grad_rows_v = scale Σ_t e_tv weighted_input_t + Σ_{t: y_t = v} a_t x_t``, rounded once.

    Args:
        grad_rows: The slab's rows of the weight's gradient, (columns, H), contiguous.
        slab, rows: See there.
        weighted_input: −f_t c_t x_t / scale in the hidden states' dtype, (N, H); or x_t, if the slab has been
            multiplied by that factor.
    """
    e, x = slab.exponentials, rows.input
    if e.shape[0] and serves_descriptors(e, weighted_input, grad_rows) and x.stride(1) == 1:
        _fused_weight_gradient(grad_rows, slab, rows, weighted_input)
        return
    for start in range(0, e.shape[1], WIDE_ROWS):
        # All terms are added in the accumulator's dtype, so that the sum is rounded once. Rounding the product before
        # the targets' terms were added doubled the error of float16's subnormal gradients.
        part = e[:, start : start + WIDE_ROWS]
        total = product(part.t(), weighted_input)
        note("weight_product", e.dtype, rows=e.shape[0], columns=part.shape[1], hidden=x.shape[1])
        total *= rows.coefficients.scale
        _add_target_terms(total, slab.first_column + start, rows)
        grad_rows[start : start + WIDE_ROWS] = total


def _fused_weight_gradient(grad_rows: Tensor, slab: Slab, rows: Rows, weighted_input: Tensor) -> None:
    (count, columns), hidden = slab.exponentials.shape, grad_rows.shape[1]
    blocks = WEIGHT_GRADIENT
    tiles = cdiv(columns, blocks.columns) * cdiv(hidden, blocks.hidden)
    # The interpreter truncates where it should round to bfloat16, so torch rounds its result.
    written = torch.empty_like(grad_rows, dtype=rows.coefficients.scale.dtype) if INTERPRETED else grad_rows
    weight_gradient_kernel[(programs(grad_rows.device, tiles, persistent=True),)](
        TensorDescriptor.from_tensor(slab.exponentials, [blocks.rows, blocks.columns]),
        TensorDescriptor.from_tensor(weighted_input, [blocks.rows, blocks.hidden]),
        # Half a tile's hidden entries, as the kernel stores them.
        TensorDescriptor.from_tensor(written, [blocks.columns, blocks.hidden // 2]),
        rows.coefficients.scale,
        rows.input,
        rows.coefficients.at_target,
        rows.targets.target,
        rows.targets.order,
        rows.targets.bounds,
        row_count=count,
        column_count=columns,
        first_column=slab.first_column,
        hidden=hidden,
        stride_input_row=rows.input.stride(0),
        UPCAST=INTERPRETED,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_HIDDEN=blocks.hidden,
        BLOCK_ROWS=blocks.rows,
        BLOCK_TARGETS=32,
        GROUP=blocks.group,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    note("weight_gradient_kernel", grad_rows.dtype, descriptors=True, rows=count, columns=columns, hidden=hidden)
    if written is not grad_rows:
        grad_rows.copy_(written)


def _add_target_terms(grad_rows: Tensor, first_target: int, rows: Rows) -> None:
    """``grad_rows[v − first_target] += Σ_{t: y_t = v} a_t x_t``; (R, H), contiguous, accumulator's dtype."""
    count, hidden = rows.input.shape
    if count == 0:
        return
    block_rows, block_hidden = (64, 256) if INTERPRETED else (32, 64)
    add_target_terms_kernel[(cdiv(count, block_rows), cdiv(hidden, block_hidden))](
        grad_rows,
        rows.input,
        rows.coefficients.at_target,
        rows.targets.target,
        rows.targets.order,
        row_count=count,
        first_target=first_target,
        grad_rows=grad_rows.shape[0],
        hidden=hidden,
        stride_grad_row=grad_rows.stride(0),
        stride_input_row=rows.input.stride(0),
        stride_input_hidden=rows.input.stride(1),
        ACCUMULATOR=ACCUMULATORS[accumulator_dtype(rows.input.dtype)],
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=block_hidden,
    )
    note("add_target_terms_kernel", rows.input.dtype, rows=count, columns=grad_rows.shape[0], hidden=hidden)


def bias_gradient(grad_rows: Tensor, slab: Slab, rows: Rows) -> None:
    """``grad_rows_v = −Σ_t f_t c_t e_tv + Σ_{t: y_t = v} a_t``; (columns,), accumulator's dtype."""
    count, columns = slab.exponentials.shape
    bias_gradient_kernel[(cdiv(columns, _STRETCH),)](
        slab.exponentials,
        rows.coefficients.scale,
        rows.coefficients.elsewhere,
        rows.coefficients.at_target,
        rows.targets.target,
        rows.targets.order,
        rows.targets.bounds,
        grad_rows,
        row_count=count,
        column_count=columns,
        first_column=slab.first_column,
        stride_slab_row=slab.exponentials.stride(0),
        BLOCK_ROWS=64,
        BLOCK_COLUMNS=_STRETCH,
    )
    note("bias_gradient_kernel", slab.exponentials.dtype, rows=count, columns=columns)


def input_gradient(grad: Tensor, places: Tensor, sums: Tensor, weight: Tensor, rows: Rows) -> None:
    """``grad[places_t] = −f_t c_t sums_t + a_t w_{y_t}``, rounded once.

    Args:
        grad: (all tokens, H), contiguous.
        places: Which row of ``grad`` each row belongs to, (N,), int64.
        sums: Σ_v e_tv w_v, (N, H), contiguous, accumulator's dtype.
        weight: (V, H), any strides.
        rows: See there.
    """
    count, hidden = sums.shape
    block_rows, block_hidden = (64, 256) if INTERPRETED else (4, 512)
    # The interpreter truncates where it should round to bfloat16, so torch rounds its result.
    written = torch.zeros_like(grad, dtype=sums.dtype) if INTERPRETED else grad
    finish_input_gradient_kernel[(cdiv(count, block_rows), cdiv(hidden, block_hidden))](
        sums,
        rows.coefficients.scale,
        rows.coefficients.elsewhere,
        rows.coefficients.at_target,
        rows.target,
        places,
        weight,
        written,
        row_count=count,
        vocabulary=weight.shape[0],
        hidden=hidden,
        stride_weight_row=weight.stride(0),
        stride_weight_hidden=weight.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=block_hidden,
    )
    note("finish_input_gradient_kernel", grad.dtype, rows=count, hidden=hidden)
    if written is not grad:
        grad.copy_(written)
