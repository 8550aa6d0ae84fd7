"""Triton, backward: the gradients of weight and bias from a slab of exponentials.

With p = softmax(z) and c_t = ∂L/∂log π(y_t), the gradients are

    ∂L/∂x_t = c_t (1 − p_{t,y_t}) w_{y_t} − c_t Σ_{v ≠ y_t} p_tv w_v
    ∂L/∂w_v = Σ_{t: y_t = v} c_t (1 − p_tv) x_t − Σ_{t: y_t ≠ v} p_tv c_t x_t
    ∂L/∂b_v = Σ_{t: y_t = v} c_t (1 − p_tv) − Σ_{t: y_t ≠ v} p_tv c_t

A slab (all tokens, some vocabulary columns) holds e_tv, zero at the targets, with p_tv = f_t e_tv for a factor f_t of
the row. Nothing else of the logits' size is stored. The targets' terms, a_t = c_t (1 − p_{t,y_t}), are added unrounded.
In a 16-bit slab c_t, one value for a whole sequence, would be rounded, and 1 − p would round to 1 whenever p < 2^-9.
Neither error averages out: bf16 gradients came out 0.2 % too long or too short.
"""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

from ktonum.kernels.device.logits.kernels import grouped_tile

__all__ = [
    "add_target_terms_kernel",
    "bias_gradient_kernel",
    "finish_input_gradient_kernel",
    "stretch_bounds_kernel",
    "weight_gradient_kernel",
]


@triton.jit(do_not_specialize=["count", "stretches", "vocabulary", "steps"])
def stretch_bounds_kernel(
    target_ptr, bound_ptr, count, stretches, vocabulary, steps, STRETCH: tl.constexpr, BLOCK: tl.constexpr
):
    """How many of the sorted targets are below each multiple of STRETCH, and below the vocabulary's size; int64.

    It bisects, in as many steps as ``count`` has bits.
    """
    edges = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    edge = tl.minimum(edges.to(tl.int64) * STRETCH, vocabulary)
    low = tl.zeros((BLOCK,), dtype=tl.int64)
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        open = low < high
        below = tl.load(target_ptr + middle, mask=open, other=0) < edge
        low = tl.where(open & below, middle + 1, low)
        high = tl.where(open & (below == 0), middle, high)
    tl.store(bound_ptr + edges, low, mask=edges <= stretches)


@triton.jit
def as_products(accumulator, a, b, UPCAST: tl.constexpr):
    """``accumulator + a b`` for coefficients a in float32 and b in bfloat16 or float16, as exact as float32 is.

    Tensor cores take 16-bit operands: a is the sum of three bfloat16 numbers and a float16 b of two, exactly.
    """
    if UPCAST:
        # The interpreter's bfloat16 is wrong.
        return tl.dot(a, b.to(tl.float32), accumulator, input_precision="ieee")
    first = a.to(tl.bfloat16)
    rest = a - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    high = b.to(tl.bfloat16)
    accumulator = tl.dot(first, high, accumulator)
    accumulator = tl.dot(second, high, accumulator)
    accumulator = tl.dot(third, high, accumulator)
    if b.dtype == tl.float16:
        low = (b.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        accumulator = tl.dot(first, low, accumulator)
        accumulator = tl.dot(second, low, accumulator)
        accumulator = tl.dot(third, low, accumulator)
    return accumulator


@triton.jit(do_not_specialize=["row_count", "column_count", "first_column", "hidden"])
def weight_gradient_kernel(
    slab,
    weighted_input,
    grad_rows,
    scale_ptr,
    input_ptr,
    coefficient_ptr,
    target_ptr,
    order_ptr,
    bound_ptr,
    row_count,
    column_count,
    first_column,
    hidden,
    stride_input_row,
    UPCAST: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TARGETS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_w_v = scale Σ_t e_tv (−f_t c_t x_t / scale) + Σ_{t: y_t = v} a_t x_t for a slab's columns v, rounded once.

    ``slab`` (rows, columns), ``weighted_input`` (rows, hidden) and ``grad_rows`` (columns, hidden) are tensor
    descriptors; ``input``, (rows, hidden), has hidden stride 1. ``target`` is sorted, and ``order`` holds the rows it
    came from. ``bound`` says where the targets of each BLOCK_COLUMNS-wide stretch of the vocabulary begin, and where
    those of the last one end.
    """
    column_tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    hidden_tiles = tl.cdiv(hidden, BLOCK_HIDDEN)
    for tile in tl.range(tl.program_id(0), column_tiles * hidden_tiles, tl.num_programs(0)):
        column_tile, hidden_tile = grouped_tile(tile, column_tiles, hidden_tiles, GROUP)
        total = tl.zeros((BLOCK_COLUMNS, BLOCK_HIDDEN), dtype=tl.float32)
        for i in range(0, tl.cdiv(row_count, BLOCK_ROWS)):
            e = slab.load([i * BLOCK_ROWS, column_tile * BLOCK_COLUMNS])
            x = weighted_input.load([i * BLOCK_ROWS, hidden_tile * BLOCK_HIDDEN])
            if UPCAST:
                e = e.to(tl.float32)
                x = x.to(tl.float32)
            total = tl.dot(e.T, x, total)
        total *= tl.load(scale_ptr)
        v = first_column + column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        h = hidden_tile * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        stretch = first_column // BLOCK_COLUMNS + column_tile
        start = tl.load(bound_ptr + stretch)
        stop = tl.load(bound_ptr + stretch + 1)
        for place in tl.range(start, stop, BLOCK_TARGETS, num_stages=1):
            places = place + tl.arange(0, BLOCK_TARGETS)
            present = places < stop
            target = tl.load(target_ptr + places, mask=present, other=-1)
            row = tl.load(order_ptr + places, mask=present, other=0)
            a = tl.load(coefficient_ptr + row, mask=present, other=0.0)
            x = tl.load(
                input_ptr + row[:, None] * stride_input_row + h[None, :],
                mask=present[:, None] & (h < hidden)[None, :],
                other=0.0,
            )
            chosen = tl.where(v[:, None] == target[None, :], a[None, :], 0.0)
            total = as_products(total, chosen, x, UPCAST)
        # In halves: a whole tile in shared memory would cost the loads a stage of their pipeline.
        halves = tl.permute(tl.reshape(total, (BLOCK_COLUMNS, 2, BLOCK_HIDDEN // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        at = hidden_tile * BLOCK_HIDDEN
        grad_rows.store([column_tile * BLOCK_COLUMNS, at], left.to(grad_rows.dtype))
        grad_rows.store([column_tile * BLOCK_COLUMNS, at + BLOCK_HIDDEN // 2], right.to(grad_rows.dtype))


@triton.jit(do_not_specialize=["row_count", "first_column"])
def bias_gradient_kernel(
    slab_ptr,
    scale_ptr,
    factor_ptr,
    coefficient_ptr,
    target_ptr,
    order_ptr,
    bound_ptr,
    grad_ptr,
    row_count,
    column_count,
    first_column,
    stride_slab_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """grad_b_v = Σ_{t: y_t = v} a_t + scale Σ_t factor_t e_tv for a slab's columns v; as of the weight's kernel.

    ``factor``, (rows,), is −f_t c_t / scale in the accumulator's dtype; sums over BLOCK_ROWS rows are added in float64.
    """
    column_tile = tl.program_id(0)
    local = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float64)
    for first in range(0, row_count, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        row_mask = rows < row_count
        factor = tl.load(factor_ptr + rows, mask=row_mask, other=0.0)
        at = slab_ptr + rows[:, None].to(tl.int64) * stride_slab_row + local[None, :]
        e = tl.load(at, mask=row_mask[:, None] & (local < column_count)[None, :], other=0.0).to(factor.dtype)
        total += tl.sum(factor[:, None] * e, axis=0).to(tl.float64)
    total *= tl.load(scale_ptr).to(tl.float64)
    stretch = first_column // BLOCK_COLUMNS + column_tile
    stop = tl.load(bound_ptr + stretch + 1)
    for place in range(tl.load(bound_ptr + stretch), stop, BLOCK_ROWS):
        places = place + tl.arange(0, BLOCK_ROWS)
        present = places < stop
        target = tl.load(target_ptr + places, mask=present, other=-1)
        a = tl.load(coefficient_ptr + tl.load(order_ptr + places, mask=present, other=0), mask=present, other=0.0)
        chosen = tl.where(target[:, None] == (first_column + local)[None, :], a[:, None], 0.0)
        total += tl.sum(chosen.to(tl.float64), axis=0)
    tl.store(grad_ptr + local, total.to(grad_ptr.dtype.element_ty), mask=local < column_count)


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
    in its block, in the order of their rows. It needs no atomics, so results are deterministic.
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
    # Each place gets the sum over the block's places that have its target, as a product with a matrix of 0 and 1.
    same = (target[:, None] == target[None, :]).to(ACCUMULATOR)
    total = tl.dot(same, a[:, None] * x.to(ACCUMULATOR), input_precision="ieee", out_dtype=ACCUMULATOR)
    # The last target may have further places behind the block.
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
    local = (target - first_target).to(tl.int64)
    stored = here[:, None] & inside[None, :]
    at = grad_weight_ptr + local[:, None] * stride_grad_row + offsets[None, :]
    total += tl.load(at, mask=stored, other=0.0).to(ACCUMULATOR)
    tl.store(at, total.to(grad_weight_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["row_count", "vocabulary"])
def finish_input_gradient_kernel(
    sum_ptr,
    scale_ptr,
    factor_ptr,
    coefficient_ptr,
    target_ptr,
    place_ptr,
    weight_ptr,
    grad_ptr,
    row_count,
    vocabulary,
    hidden,
    stride_weight_row,
    stride_weight_hidden,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """grad at ``place_t`` = scale factor_t Σ_v e_tv w_v + a_t w_{y_t}, in the accumulator's dtype, rounded once.

    ``sum``, (rows, hidden), holds the sums over v; ``grad`` is (all tokens, hidden); both are contiguous.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offsets = (tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)).to(tl.int64)
    row_mask = rows < row_count
    mask = row_mask[:, None] & (offsets < hidden)[None, :]
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
    known = (target >= 0) & (target < vocabulary)
    w_rows = tl.where(known, target, 0)[:, None] * stride_weight_row
    w = tl.load(weight_ptr + w_rows + offsets[None, :] * stride_weight_hidden, mask=mask & known[:, None], other=0.0)
    total = tl.load(sum_ptr + rows.to(tl.int64)[:, None] * hidden + offsets[None, :], mask=mask, other=0.0)
    total *= tl.load(factor_ptr + rows, mask=row_mask, other=0.0)[:, None]
    total *= tl.load(scale_ptr)
    total += tl.load(coefficient_ptr + rows, mask=row_mask, other=0.0)[:, None] * w.to(total.dtype)
    place = tl.load(place_ptr + rows, mask=row_mask, other=0)[:, None] * hidden + offsets[None, :]
    tl.store(grad_ptr + place, total.to(grad_ptr.dtype.element_ty), mask=mask)
