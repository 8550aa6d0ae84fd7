"""Triton: what is computed for each row, beside the tiles of logits."""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

from ktonum.kernels.device.softmax.kernels import LARGEST_EXPONENT, LOG2_E

__all__ = ["reduce_tiles_kernel", "rescale_slab_kernel", "target_logits_kernel"]

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["row_count", "vocabulary"])
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

    The random error of a log-probability is that of its target's logit. In float64 that costs one pass over N rows of
    the head.
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
    # A bias of -inf makes a logit infinite, and exponentials cannot be relative to that.
    shift = tl.where(logit == float("-inf"), 0.0, logit)
    tl.store(shift_ptr + rows, shift.to(shift_ptr.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["row_count", "tile_count"])
def reduce_tiles_kernel(
    tile_shift_ptr,
    tile_sum_ptr,
    target_logit_ptr,
    shift_ptr,
    token_logp_ptr,
    token_others_ptr,
    row_shift_ptr,
    row_factor_ptr,
    differ_ptr,
    row_count,
    tile_count,
    TILE_RELATIVE: tl.constexpr,
    SLAB_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """log π(y) = −log(1 + S) with S = 2^(M − z₂_y) Σ_j s_j 2^(m_j − M) over all tiles j, M = max_j m_j; in float64.

    The tiles' sums leave out the target. KTO applies a sigmoid to a sum over thousands of tokens. float64 costs nothing
    here (one value for each tile) and leaves the product as the only source of error.

    Further results:

    - ``token_others`` = 1 − π(y) = S / (1 + S).
    - ``row_shift``: what the row's exponentials are stored relative to, a number of the dtype of ``shift``. It is
      ``shift`` (the target's logit), or lse₂ if that is too far above; with TILE_RELATIVE it is lse₂, rounded up.
    - ``row_factor`` = 2^(row_shift − lse₂) / SLAB_SCALE: times it, exponentials are probabilities.
    - ``differ``, int32: for each block of rows, whether some tile is relative to another shift.

    All but ``differ`` are float64, (rows,).
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < row_count
    # Online over blocks of tiles: `maximum` and `total` stand for the tiles seen so far.
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float64)
    lowest = tl.full((BLOCK_ROWS,), float("inf"), tl.float64)
    total = tl.zeros((BLOCK_ROWS,), tl.float64)
    for start in range(0, tile_count, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        mask = (tiles < tile_count)[:, None] & row_mask[None, :]
        at = tiles[:, None].to(tl.int64) * row_count + rows[None, :]
        m = tl.load(tile_shift_ptr + at, mask=mask, other=float("-inf")).to(tl.float64)
        s = tl.load(tile_sum_ptr + at, mask=mask, other=0.0).to(tl.float64)
        new_maximum = tl.maximum(maximum, tl.max(m, axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(mask, m, float("inf")), axis=0))
        # Rows past the end stay at −inf: subtracting it from itself would give NaN.
        base = tl.where(row_mask, new_maximum, 0.0)
        total = total * tl.exp2(maximum - base) + tl.sum(s * tl.exp2(m - base[None, :]), axis=0)
        maximum = new_maximum
    logit = tl.load(target_logit_ptr + rows, mask=row_mask, other=0.0)
    # Not `total > 0`: a NaN must come through.
    none = total == 0.0
    rest = tl.log2(tl.where(none, 1.0, total))
    # log₂ S; −inf where there is no other entry. The difference is taken first, because it is exactly 0 where M is the
    # target's logit.
    others = tl.where(none, float("-inf"), (maximum - logit) + rest)
    # log(1 + S) = max(log S, 0) + log1p(x) with x = min(S, 1/S); log1p(x) = x log(1 + x) / ((1 + x) − 1), Kahan's.
    x = tl.exp2(-tl.abs(others))
    w = 1.0 + x
    log1p = tl.where(w == 1.0, x, tl.log(w) * x / tl.where(w == 1.0, 1.0, w - 1.0))
    surprise = tl.maximum(others, 0.0) * LN_2 + log1p
    tl.store(token_logp_ptr + rows, -surprise, mask=row_mask)
    tl.store(token_others_ptr + rows, tl.where(others >= 0.0, 1.0, x) / w, mask=row_mask)
    # The logit of an impossible target is −inf, and its surprise infinite.
    logsumexp = tl.where(logit == float("-inf"), maximum + rest, logit + surprise * LOG2_E)
    shift = tl.load(shift_ptr + rows, mask=row_mask, other=0.0)
    far = logsumexp - shift.to(tl.float64) > LARGEST_EXPONENT
    reach = logsumexp.to(shift.dtype)
    if TILE_RELATIVE:
        far = row_mask
        reach = tl.ceil(reach)
    row_shift = tl.where(far, reach, shift).to(tl.float64)
    tl.store(row_shift_ptr + rows, row_shift, mask=row_mask)
    factor = tl.exp2(row_shift - logsumexp) / SLAB_SCALE
    tl.store(row_factor_ptr + rows, factor, mask=row_mask)
    differs = row_mask & ((maximum != row_shift) | (lowest != row_shift))
    tl.store(differ_ptr + tl.program_id(0), tl.max(differs.to(tl.int32), axis=0))


# The count of columns is specialised: if it is known to be a multiple of 16, loads are wide in spite of their masks.
@triton.jit(do_not_specialize=["row_count", "first_tile"])
def rescale_slab_kernel(
    slab_ptr,
    tile_shift_ptr,
    row_shift_ptr,
    differ_ptr,
    row_count,
    first_tile,
    column_count,
    stride_slab_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS_AT_A_TIME: tl.constexpr,
):
    """Brings exponentials that are stored relative to ``tile_shift`` to their rows' common ``row_shift``.

    Tiles are BLOCK_COLUMNS wide; the slab's first is the vocabulary's ``first_tile``. ``differ``, of blocks of
    BLOCK_ROWS rows, says where there is anything to do.
    """
    if tl.load(differ_ptr + tl.program_id(1)) == 0:
        return
    first_row = tl.program_id(1) * BLOCK_ROWS
    # Neighbouring programs have neighbouring columns, so that they read the same pages of memory.
    for group in range(tl.program_id(0), tl.cdiv(column_count, BLOCK_COLUMNS * TILES), tl.num_programs(0)):
        tiles = group * TILES + tl.arange(0, TILES)
        local = tiles[:, None] * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        shifts = tile_shift_ptr + (first_tile + tiles).to(tl.int64)[None, :] * row_count
        for first in range(first_row, first_row + BLOCK_ROWS, ROWS_AT_A_TIME):
            rows = first + tl.arange(0, ROWS_AT_A_TIME)
            row_mask = rows < row_count
            here = row_mask[:, None] & (tiles * BLOCK_COLUMNS < column_count)[None, :]
            own = tl.load(shifts + rows[:, None], mask=here, other=0.0)
            common = tl.load(row_shift_ptr + rows, mask=row_mask, other=0.0).to(own.dtype)
            if tl.max(tl.max((here & (own != common[:, None])).to(tl.int32), axis=1), axis=0) == 1:
                mask = row_mask[:, None, None] & (local < column_count)[None, :, :]
                places = slab_ptr + (rows.to(tl.int64)[:, None, None] * stride_slab_row + local[None, :, :])
                e = tl.load(places, mask=mask, other=0.0).to(own.dtype) * tl.exp2(own - common[:, None])[:, :, None]
                tl.store(places, e.to(slab_ptr.dtype.element_ty), mask=mask)
