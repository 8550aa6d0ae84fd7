"""Triton, backward: the gradient with respect to a slab of logits, recomputed tile by tile.

With p = softmax(z) and c_t = ∂L/∂log π(y_t), the gradient factors by token:

    ∂L/∂z_tv = c_t (1[v = y_t] − p_tv)

The slab (all tokens, some vocabulary columns) is the only place where anything of the logits' size is stored; two
matrix products turn it into the gradients of input and weight. It holds the bracket alone: c_t is one value for a whole
sequence, so that its rounding to 16 bits would not average out (bf16 gradients came out 0.2 % too long or too short).
"""

# Triton reads the annotations of jitted functions; they must stay objects, so no postponed evaluation here.
import triton
import triton.language as tl

from ktonum.kernels.logsumexp_kernels import grouped_tile, logits_tile

__all__ = ["logit_gradient_kernel"]


@triton.jit
def logit_gradient_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    logsumexp_ptr,
    coefficient_ptr,
    slab_ptr,
    bias_partial_ptr,
    row_count,
    vocabulary,
    hidden,
    slab_start,
    slab_columns,
    stride_input_row,
    stride_input_hidden,
    stride_weight_row,
    stride_weight_hidden,
    stride_slab_row,
    HAS_BIAS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    SLAB_SCALE: tl.constexpr,
    EVEN_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes SLAB_SCALE (1[v = y_t] − exp(z_tv − lse_t)) to ``slab``, (rows, slab columns), rounded to its dtype.

    ``bias_partial``, (row tiles, V), receives Σ_t c_t (1[v = y_t] − p_tv) over each tile's rows, unrounded: the bias
    gradient before the sum over row tiles.
    """
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(row_count, BLOCK_ROWS), tl.cdiv(slab_columns, BLOCK_COLUMNS), GROUP
    )
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    local = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    columns = slab_start + local
    row_mask = rows < row_count
    column_mask = (local < slab_columns) & (columns < vocabulary)
    z = logits_tile(
        input_ptr,
        weight_ptr,
        bias_ptr,
        rows,
        row_mask,
        columns,
        column_mask,
        hidden,
        stride_input_row,
        stride_input_hidden,
        stride_weight_row,
        stride_weight_hidden,
        HAS_BIAS,
        EVEN_HIDDEN,
        UPCAST,
        ACCUMULATOR,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_HIDDEN,
    )
    logsumexp = tl.load(logsumexp_ptr + rows, mask=row_mask, other=0.0).to(ACCUMULATOR)
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
    p = tl.exp(z - logsumexp[:, None])
    one_hot = tl.where(columns[None, :] == target[:, None], 1.0, 0.0).to(ACCUMULATOR)
    mask = row_mask[:, None] & column_mask[None, :]
    bracket = tl.where(mask, one_hot - p, 0.0)
    at = rows[:, None].to(tl.int64) * stride_slab_row + local[None, :]
    tl.store(slab_ptr + at, (bracket * SLAB_SCALE).to(slab_ptr.dtype.element_ty), mask=mask)
    if BIAS_GRADIENT:
        coefficient = tl.load(coefficient_ptr + rows, mask=row_mask, other=0.0)
        partial = row_tile.to(tl.int64) * vocabulary + columns
        tl.store(bias_partial_ptr + partial, tl.sum(coefficient[:, None] * bracket, axis=0), mask=column_mask)
