"""Launching the small kernels beside the matrix products: sums over columns and tokens, rows' coefficients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.device.block_sizes import cdiv
from ktonum.kernels.device.hardware import INTERPRETED
from ktonum.kernels.device.products import accumulator_dtype
from ktonum.kernels.device.statistics.launch import RowStatistics
from ktonum.kernels.device.sums.kernels import (
    column_sums_kernel,
    input_sums_kernel,
    logit_sums_kernel,
    row_coefficients_kernel,
    scale_rows_kernel,
)
from ktonum.kernels.device.trace import note

__all__ = ["ColumnSums", "Coefficients", "column_sums", "logit_sums", "row_coefficients", "scale_rows"]


@dataclass(frozen=True)
class ColumnSums:
    """Σ_v w_v, float64, and max |w_v|, accumulator's dtype, over stretches of V: (stretches, H).

    If W is not finite, they are not.
    """

    sums: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Coefficients:
    """How much each row's token counts in the gradients, in the accumulator's dtype.

    Attributes:
        at_target: a_t = c_t (1 − p_{t,y_t}), (N,).
        elsewhere: −f_t c_t / scale, (N,). Times the scale, it is the coefficient of e_tv at v ≠ y_t.
        scale: A power of two that keeps ``elsewhere`` in range, a scalar.
    """

    at_target: Tensor
    elsewhere: Tensor
    scale: Tensor


def column_sums(weight: Tensor) -> ColumnSums:
    """Column sums of a head, (V, H), any strides."""
    rows, hidden = weight.shape
    stretches, block_rows, block_hidden = (1, 512, 256) if INTERPRETED else (64, 16, 256)
    sums = torch.empty((stretches, hidden), dtype=torch.float64, device=weight.device)
    largest = torch.empty_like(sums, dtype=accumulator_dtype(weight.dtype))
    column_sums_kernel[(stretches, cdiv(hidden, block_hidden))](
        weight,
        sums,
        largest,
        row_count=rows,
        rows_each=cdiv(rows, stretches),
        hidden=hidden,
        stride_weight_row=weight.stride(0),
        stride_weight_hidden=weight.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=block_hidden,
    )
    note("column_sums_kernel", weight.dtype, columns=rows, hidden=hidden)
    return ColumnSums(sums, largest)


def logit_sums(input: Tensor, columns: ColumnSums, bias: Tensor | None, sound: Tensor) -> Tensor:
    """Σ_t Σ_v z_tv = (Σ_t x_t) · (Σ_v w_v) + T Σ_v b_v, (B,), float64, masked tokens included, without any logits.

    Args:
        input: (B, T, H), any strides.
        columns: Of the head.
        bias: (V,), contiguous, or None.
        sound: Written, (2,), float64: a bound on every partial sum of a logit, and the sum of the result. If a hidden
            state or an entry of the head or bias is not finite, one of the two is not.
    """
    batch, tokens, hidden = input.shape
    block_tokens, block_hidden = (64, 256) if INTERPRETED else (16, 256)
    tokens_each = 4096 if INTERPRETED else 128
    stretches, tiles = cdiv(tokens, tokens_each), cdiv(hidden, block_hidden)
    count = batch * stretches * tiles
    found = torch.empty(2 * count + batch, dtype=torch.float64, device=input.device)
    parts, sums = found[: 2 * count], found[2 * count :]
    if count:
        input_sums_kernel[(batch * stretches, tiles)](
            input,
            columns.sums,
            columns.largest,
            parts,
            tokens=tokens,
            tokens_each=tokens_each,
            stretches=stretches,
            column_stretches=columns.sums.shape[0],
            hidden=hidden,
            stride_input_sequence=input.stride(0),
            stride_input_row=input.stride(1),
            stride_input_hidden=input.stride(2),
            BLOCK_ROWS=block_tokens,
            BLOCK_HIDDEN=block_hidden,
            BLOCK_STRETCHES=1 if INTERPRETED else 8,
        )
        note("input_sums_kernel", input.dtype, sequences=batch, tokens=tokens, hidden=hidden)
    logit_sums_kernel[(1,)](
        parts,
        parts if bias is None else bias,
        sums,
        sound,
        batch=batch,
        parts=stretches * tiles,
        tokens=tokens,
        vocabulary=0 if bias is None else bias.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK_SEQUENCES=16,
        BLOCK=2048,
    )
    note("logit_sums_kernel", input.dtype, sequences=batch)
    return sums


def row_coefficients(
    upstream: Tensor,
    statistics: RowStatistics,
    target: Tensor,
    places: Tensor,
    *,
    tokens: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> Coefficients:
    """How much the rows' tokens count in the gradients. c_t is the upstream gradient of the sequence, 0 for masked
    tokens.

    A saturated sigmoid makes coefficients of 1e-14, and an unlikely target factors of 1e-24. Products of both would be
    subnormal in float32 and bfloat16, and either one alone in float16. So they are divided by a power of two that
    brings the largest to [1/2, 1).

    Args:
        upstream: ∂L/∂logps, (B,), float64.
        statistics: Of the rows.
        target: (N,), int64.
        places: Flat index of each row among the (B, T) tokens, (N,), int64.
        tokens: T.
        ignore_index: Marks masked tokens.
        dtype: Of the hidden states.
    """
    wide = accumulator_dtype(dtype)
    at_target, elsewhere = torch.empty((2, len(target)), dtype=wide, device=target.device).unbind()
    found = Coefficients(at_target, elsewhere, torch.empty((), dtype=wide, device=target.device))
    row_coefficients_kernel[(1,)](
        upstream.contiguous(),
        statistics.others,
        statistics.factor,
        target,
        places,
        found.at_target,
        found.elsewhere,
        found.scale,
        row_count=len(target),
        tokens=tokens,
        ignore_index=ignore_index,
        BLOCK=2048,
        num_warps=16,
    )
    note("row_coefficients_kernel", dtype, rows=len(target))
    return found


def scale_rows(rows: Tensor, factors: Tensor, out: Tensor) -> None:
    """``out_t = factors_t rows_t``, rounded once to its dtype; (N, columns) each, ``out`` may be ``rows``."""
    count, columns = rows.shape
    # The interpreter truncates where it should round to bfloat16, so torch rounds its result.
    written = torch.empty_like(out, dtype=factors.dtype) if INTERPRETED else out
    block_rows, block_columns = (64, 256) if INTERPRETED else (4, 512)
    if count:
        scale_rows_kernel[(cdiv(count, block_rows), cdiv(columns, block_columns))](
            rows,
            factors,
            written,
            row_count=count,
            column_count=columns,
            stride_rows_row=rows.stride(0),
            stride_rows_hidden=rows.stride(1),
            stride_scaled_row=written.stride(0),
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
        )
        note("scale_rows_kernel", rows.dtype, rows=count, width=columns)
    if written is not out:
        out.copy_(written)
