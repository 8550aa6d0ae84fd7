"""Triton: what is computed row by row or column by column, beside the tiles of logits."""

# Triton reads the annotations of jitted functions; they must stay objects, so no postponed evaluation here.
import triton
import triton.language as tl

from ktonum.kernels.logits_kernels import LARGEST_EXPONENT, LOG2_E

__all__ = [
    "column_sums_kernel",
    "count_targets_kernel",
    "finish_input_gradient_kernel",
    "finish_slab_kernel",
    "reduce_tiles_kernel",
    "scale_rows_kernel",
    "target_logits_kernel",
]

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["row_count", "vocabulary", "hidden"])
def target_logits_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    logit_ptr,
    shift_ptr,
    row_count,
    vocabulary,
    hidden,
    stride_input_row,
    stride_input_hidden,
    stride_weight_row,
    stride_weight_hidden,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """z₂ at each row's target, in float64 (``logit``) and rounded to the dtype of ``shift``; 0 outside the vocabulary.

    A log-probability's random error is its target's; in float64 it costs one pass over N rows of the head.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < row_count
    target = tl.load(target_ptr + rows, mask=row_mask, other=0)
    known = row_mask & (target >= 0) & (target < vocabulary)
    x_ptrs = input_ptr + tl.where(row_mask, rows, 0).to(tl.int64)[:, None] * stride_input_row
    w_ptrs = weight_ptr + tl.where(known, target, 0)[:, None] * stride_weight_row
    total = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), dtype=tl.float64)
    for start in range(0, hidden, BLOCK_HIDDEN):
        offsets = (start + tl.arange(0, BLOCK_HIDDEN)).to(tl.int64)
        mask = known[:, None] & (offsets < hidden)[None, :]
        x = tl.load(x_ptrs + offsets[None, :] * stride_input_hidden, mask=mask, other=0.0)
        w = tl.load(w_ptrs + offsets[None, :] * stride_weight_hidden, mask=mask, other=0.0)
        total += x.to(tl.float64) * w.to(tl.float64)
    logit = tl.sum(total, axis=1)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float64)
    logit *= LOG2_E
    tl.store(logit_ptr + rows, logit, mask=row_mask)
    tl.store(shift_ptr + rows, logit.to(shift_ptr.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["row_count", "tile_count"])
def reduce_tiles_kernel(
    tile_shift_ptr,
    tile_sum_ptr,
    target_logit_ptr,
    shift_ptr,
    token_logp_ptr,
    row_shift_ptr,
    row_factor_ptr,
    row_count,
    tile_count,
    TILE_RELATIVE: tl.constexpr,
    SLAB_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """lse₂ = M + log₂ Σ_j s_j 2^(m_j − M) with M = max_j m_j, and log π(y) = ln 2 (z₂_y − lse₂); float64 throughout.

    KTO puts a sigmoid on a sum over thousands of tokens: float64 here costs nothing (one value a tile) and leaves the
    product itself as the only source of error.

    Also what exponentials of the row are stored relative to, ``row_shift``: ``shift`` (the target's logit), or lse₂
    where that is out of reach or TILE_RELATIVE, rounded to the dtype of ``shift``; and ``row_factor`` =
    2^(row_shift − lse₂) / SLAB_SCALE, which makes probabilities of them. All results are float64, (rows,).
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < row_count
    # Online over blocks of tiles: `maximum` and `total` stand for the tiles seen so far.
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK_ROWS,), tl.float64)
    for start in range(0, tile_count, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        mask = (tiles < tile_count)[:, None] & row_mask[None, :]
        at = tiles[:, None].to(tl.int64) * row_count + rows[None, :]
        m = tl.load(tile_shift_ptr + at, mask=mask, other=float("-inf")).to(tl.float64)
        s = tl.load(tile_sum_ptr + at, mask=mask, other=0.0).to(tl.float64)
        new_maximum = tl.maximum(maximum, tl.max(m, axis=0))
        # Rows past the end stay at −inf: subtracting it from itself would give NaN.
        base = tl.where(row_mask, new_maximum, 0.0)
        total = total * tl.exp2(maximum - base) + tl.sum(s * tl.exp2(m - base[None, :]), axis=0)
        maximum = new_maximum
    logsumexp = maximum + tl.log2(tl.where(row_mask, total, 1.0))
    logit = tl.load(target_logit_ptr + rows, mask=row_mask, other=0.0)
    tl.store(token_logp_ptr + rows, (logit - logsumexp) * LN_2, mask=row_mask)
    shift = tl.load(shift_ptr + rows, mask=row_mask, other=0.0)
    far = logsumexp - shift.to(tl.float64) > LARGEST_EXPONENT
    if TILE_RELATIVE:
        far = row_mask
    row_shift = tl.where(far, logsumexp.to(shift.dtype), shift).to(tl.float64)
    tl.store(row_shift_ptr + rows, row_shift, mask=row_mask)
    factor = tl.exp2(row_shift - logsumexp) / SLAB_SCALE
    tl.store(row_factor_ptr + rows, factor, mask=row_mask)


@triton.jit(do_not_specialize=["row_count", "first_column", "column_count"])
def finish_slab_kernel(
    slab_ptr,
    target_ptr,
    tile_shift_ptr,
    row_shift_ptr,
    row_count,
    first_column,
    column_count,
    stride_slab_row,
    RELATIVE_TO_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_AT_A_TIME: tl.constexpr,
):
    """Brings a slab of exponentials to its rows' common shift, and makes it 0 at the targets.

    With RELATIVE_TO_TILES each (row, tile) was stored relative to ``tile_shift``, as `logits_kernel` wrote it for tiles
    of BLOCK_COLUMNS; most are the row's own shift already and are left as they are.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    column_tile = tl.program_id(1)
    scaled = 0
    if RELATIVE_TO_TILES:
        tile_shifts = tile_shift_ptr + (first_column // BLOCK_COLUMNS + column_tile).to(tl.int64) * row_count
        # Names of their own: a variable that a loop assigns keeps the shape it had before.
        all_rows = first_row + tl.arange(0, BLOCK_ROWS)
        all_own = tl.load(tile_shifts + all_rows, mask=all_rows < row_count, other=0.0)
        all_common = tl.load(row_shift_ptr + all_rows, mask=all_rows < row_count, other=0.0).to(all_own.dtype)
        scaled = tl.max((all_own != all_common).to(tl.int32), axis=0)
        if scaled == 1:
            local = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            for first in range(first_row, first_row + BLOCK_ROWS, ROWS_AT_A_TIME):
                rows = first + tl.arange(0, ROWS_AT_A_TIME)
                row_mask = rows < row_count
                own = tl.load(tile_shifts + rows, mask=row_mask, other=0.0)
                common = tl.load(row_shift_ptr + rows, mask=row_mask, other=0.0).to(own.dtype)
                target = tl.load(target_ptr + rows, mask=row_mask, other=-1) - first_column
                mask = row_mask[:, None] & (local < column_count)[None, :]
                places = slab_ptr + (rows.to(tl.int64)[:, None] * stride_slab_row + local[None, :])
                e = tl.load(places, mask=mask, other=0.0).to(own.dtype) * tl.exp2(own - common)[:, None]
                e = tl.where(local[None, :] == target[:, None], 0.0, e)
                tl.store(places, e.to(slab_ptr.dtype.element_ty), mask=mask)
    # Not after the stores above: which of two stores to one place comes last is not defined.
    if scaled == 0:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        row_mask = rows < row_count
        target = tl.load(target_ptr + rows, mask=row_mask, other=-1) - first_column
        here = row_mask & (target >= 0) & (target < column_count) & (target // BLOCK_COLUMNS == column_tile)
        places = slab_ptr + (rows.to(tl.int64) * stride_slab_row + target)
        tl.store(places, tl.zeros((BLOCK_ROWS,), slab_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["row_count", "vocabulary", "hidden"])
def finish_input_gradient_kernel(
    sum_ptr,
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
    """grad at ``place_t`` = factor_t Σ_v e_tv w_v + a_t w_{y_t}, in the accumulator's dtype, rounded once.

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
    total += tl.load(coefficient_ptr + rows, mask=row_mask, other=0.0)[:, None] * w.to(total.dtype)
    place = tl.load(place_ptr + rows, mask=row_mask, other=0)[:, None] * hidden + offsets[None, :]
    tl.store(grad_ptr + place, total.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_count", "rows_each", "hidden"])
def column_sums_kernel(
    weight_ptr,
    sum_ptr,
    largest_ptr,
    row_count,
    rows_each,
    hidden,
    stride_weight_row,
    stride_weight_hidden,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Σ_v w_v, float64, and max_v |w_v| over stretches of ``rows_each`` rows: (stretches, hidden)."""
    stretch = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = offsets < hidden
    total = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), dtype=largest_ptr.dtype.element_ty)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), dtype=largest_ptr.dtype.element_ty)
    stop = tl.minimum((stretch + 1) * rows_each, row_count)
    for first in range(stretch * rows_each, stop, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        at = rows[:, None].to(tl.int64) * stride_weight_row + offsets[None, :].to(tl.int64) * stride_weight_hidden
        w = tl.load(weight_ptr + at, mask=(rows < stop)[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += w
        largest = tl.maximum(largest, tl.abs(w))
    at = stretch.to(tl.int64) * hidden + offsets
    tl.store(sum_ptr + at, tl.sum(total.to(tl.float64), axis=0), mask=inside)
    tl.store(largest_ptr + at, tl.max(largest, axis=0), mask=inside)


@triton.jit(do_not_specialize=["count", "vocabulary", "ignore_index"])
def count_targets_kernel(target_ptr, count_ptr, count, vocabulary, ignore_index, BLOCK: tl.constexpr):
    """``count[0]``: targets that are not ``ignore_index``; ``count[1]``: those of them outside the vocabulary; int64.

    One program: the host waits for it before it can launch anything else, and several small kernels took 0.3 ms.
    """
    unmasked = tl.zeros((BLOCK,), dtype=tl.int64)
    outside = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + places, mask=places < count, other=0)
        taken = (places < count) & (target != ignore_index)
        unmasked += taken.to(tl.int64)
        outside += (taken & ((target < 0) | (target >= vocabulary))).to(tl.int64)
    tl.store(count_ptr, tl.sum(unmasked, axis=0))
    tl.store(count_ptr + 1, tl.sum(outside, axis=0))


@triton.jit(do_not_specialize=["row_count", "hidden"])
def scale_rows_kernel(
    input_ptr,
    factor_ptr,
    scaled_ptr,
    row_count,
    hidden,
    stride_input_row,
    stride_input_hidden,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """``scaled`` = factor_t x_t, the product in the factors' dtype, rounded to its own; (rows, hidden), contiguous.

    A multiplication of two dtypes into a third took PyTorch three times as long (0.16 ms of a 56 ms step).
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offsets = (tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)).to(tl.int64)
    mask = (rows < row_count)[:, None] & (offsets < hidden)[None, :]
    factor = tl.load(factor_ptr + rows, mask=rows < row_count, other=0.0)
    at = rows.to(tl.int64)[:, None] * stride_input_row + offsets[None, :] * stride_input_hidden
    x = tl.load(input_ptr + at, mask=mask, other=0.0).to(factor.dtype)
    place = rows.to(tl.int64)[:, None] * hidden + offsets[None, :]
    tl.store(scaled_ptr + place, (factor[:, None] * x).to(scaled_ptr.dtype.element_ty), mask=mask)
