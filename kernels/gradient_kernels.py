"""Triton, backward: what the gradients need of the logits, recomputed tile by tile.

With p = softmax(z) and c_t = ∂L/∂log π(y_t), the gradients are

    ∂L/∂x_t = c_t (1 − p_{t,y_t}) w_{y_t} − c_t Σ_{v ≠ y_t} p_tv w_v
    ∂L/∂w_v = Σ_{t: y_t = v} c_t (1 − p_tv) x_t − Σ_{t: y_t ≠ v} p_tv c_t x_t

A slab (all tokens, some vocabulary columns) of p, zero at the targets, is the only place where anything of the logits'
size is stored; matrix products take the second sums with it. The targets' terms are added apart, unrounded: in a 16-bit
slab c_t, one value for a whole sequence, would be rounded, and 1 − p would go to 1 whenever p < 2^-9. Neither averages
out: bf16 gradients came out 0.2 % too long or too short.
"""

# Triton reads the annotations of jitted functions; they must stay objects, so no postponed evaluation here.
import triton
import triton.language as tl

from ktonum.kernels.logsumexp_kernels import grouped_tile, logits_tile

__all__ = ["add_target_terms_kernel", "probabilities_kernel"]


@triton.jit(do_not_specialize=["row_count", "vocabulary", "hidden", "slab_start", "slab_columns"])
def probabilities_kernel(
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
    PROMOTE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes SLAB_SCALE exp(z_tv − lse_t), or 0 at v = y_t, to ``slab``, (rows, slab columns), rounded to its dtype.

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
        PROMOTE,
    )
    # Rows past the end get p = 0, which no cast overflows.
    logsumexp = tl.load(logsumexp_ptr + rows, mask=row_mask, other=float("inf")).to(ACCUMULATOR)
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
    is_target = columns[None, :] == target[:, None]
    p = tl.exp(z - logsumexp[:, None])
    mask = row_mask[:, None] & column_mask[None, :]
    at = rows[:, None].to(tl.int64) * stride_slab_row + local[None, :]
    others = tl.where(is_target, 0.0, p * SLAB_SCALE)
    tl.store(slab_ptr + at, others.to(slab_ptr.dtype.element_ty), mask=mask)
    if BIAS_GRADIENT:
        coefficient = tl.load(coefficient_ptr + rows, mask=row_mask, other=0.0)
        bracket = tl.where(mask, tl.where(is_target, 1.0 - p, -p), 0.0)
        partial = row_tile.to(tl.int64) * vocabulary + columns
        tl.store(bias_partial_ptr + partial, tl.sum(coefficient[:, None] * bracket, axis=0), mask=column_mask)


@triton.jit(do_not_specialize=["row_count", "first_target", "grad_rows", "hidden"])
def add_target_terms_kernel(
    grad_weight_ptr,
    input_ptr,
    coefficient_ptr,
    target_ptr,
    order_ptr,
    row_count,
    first_target,
    grad_rows,
    hidden,
    stride_grad_row,
    stride_input_row,
    stride_input_hidden,
    ACCUMULATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """grad_weight[v − first_target] += Σ_{t: y_t = v} a_t x_t for coefficients a, in the accumulator's dtype.

    ``target`` is sorted and ``order`` holds the rows it came from. A program adds up the targets whose first place is
    in its block, in the order of their rows: no atomics, so results are deterministic.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    offsets = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = offsets < hidden
    steps = offsets[None, :].to(tl.int64) * stride_input_hidden
    places = block + tl.arange(0, BLOCK_ROWS)
    present = places < row_count
    target = tl.load(target_ptr + places, mask=present, other=-1)
    before = tl.load(target_ptr + places - 1, mask=present & (places > 0), other=-1)
    first = present & ((target != before) | (places == 0))
    here = first & (target >= first_target) & (target < first_target + grad_rows)
    if tl.max(here.to(tl.int32), axis=0) == 0:
        return
    rows = tl.load(order_ptr + places, mask=present, other=0)
    a = tl.load(coefficient_ptr + rows, mask=present, other=0.0)
    x = tl.load(
        input_ptr + rows[:, None] * stride_input_row + steps, mask=present[:, None] & inside[None, :], other=0.0
    )
    # One row a place: the sum over the block's places of the same target, as a product with a matrix of 0 and 1.
    same = (target[:, None] == target[None, :]).to(ACCUMULATOR)
    total = tl.dot(same, a[:, None] * x.to(ACCUMULATOR), input_precision="ieee", out_dtype=ACCUMULATOR)
    # The last target may go on behind the block.
    last = tl.load(target_ptr + tl.minimum(block + BLOCK_ROWS, row_count) - 1)
    starts_here = tl.max((first & (target == last)).to(tl.int32), axis=0) == 1
    rest = tl.zeros((BLOCK_HIDDEN,), dtype=ACCUMULATOR)
    place = block + BLOCK_ROWS
    going = starts_here & (place < row_count)
    while going:
        places = place + tl.arange(0, BLOCK_ROWS)
        more = places < row_count
        more = more & (tl.load(target_ptr + places, mask=more, other=-1) == last)
        rows = tl.load(order_ptr + places, mask=more, other=0)
        a = tl.load(coefficient_ptr + rows, mask=more, other=0.0)
        x = tl.load(
            input_ptr + rows[:, None] * stride_input_row + steps, mask=more[:, None] & inside[None, :], other=0.0
        )
        rest += tl.sum(a[:, None] * x.to(ACCUMULATOR), axis=0)
        place += BLOCK_ROWS
        going = (tl.sum(more.to(tl.int32), axis=0) == BLOCK_ROWS) & (place < row_count)
    total += tl.where((target == last)[:, None], rest[None, :], 0.0)
    local = target - first_target
    stored = here[:, None] & inside[None, :]
    at = grad_weight_ptr + local[:, None] * stride_grad_row + offsets[None, :]
    total += tl.load(at, mask=stored, other=0.0).to(ACCUMULATOR)
    tl.store(at, total.to(grad_weight_ptr.dtype.element_ty), mask=stored)
