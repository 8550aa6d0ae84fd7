"""Triton: what the softmax needs from a tile of logits: exponentials, their sums, and what they are relative to.

Everything is in units of log 2 (z₂ = z log₂ e), because the hardware computes powers of 2.
"""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

__all__ = ["LARGEST_EXPONENT", "LOG2_E", "softmax_kernel", "tile_exponentials"]

LOG2_E = tl.constexpr(1.4426950408889634)
#: Exponentials up to 2^80 are stored relative to the target's logit. The factor of their row is 2^-80 or more. Times a
#: small coefficient, it is still far above 2^-126, where bfloat16 and float32 underflow.
LARGEST_EXPONENT = tl.constexpr(80.0)


@triton.jit
def tile_exponentials(
    z,
    rows,
    first,
    last,
    row_count,
    bias_ptr,
    target_ptr,
    shift_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    TILE_RELATIVE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """e_tv = 2^(z₂_tv + b₂_v − m), 0 at the target, of a tile of the columns [first, last), at most BLOCK_COLUMNS.

    With S = Σ_{v ≠ y} e_v, relative to the target's own logit, 1 − p_y = S / (1 + S) keeps its digits however near 1
    p_y is. (A sum that includes the target has an error of 1e-7 of 1, not of S.)

    ``z`` is z₂ without the bias, (rows, BLOCK_COLUMNS), and ``shift``, (rows,), is s_t. With STATISTICS every
    (row, tile) has an m of its own. It is the row's s_t unless the tile's largest exponent would pass LARGEST_EXPONENT;
    then it is the largest z₂. With TILE_RELATIVE it is always the largest z₂, rounded up. m and Σ_v e_tv go to
    ``tile_shift`` and ``tile_sum``, (column tiles of the vocabulary, rows). Without STATISTICS m = s_t.
    """
    wide: tl.constexpr = z.dtype
    within = tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < row_count
    column_mask = first + within < last
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first + within, mask=column_mask, other=0.0).to(wide)
        z += (bias * LOG2_E)[None, :]
    if first + BLOCK_COLUMNS > last:
        z = tl.where(column_mask[None, :], z, float("-inf"))
    # Rows past the end get e = 0 unless exponentials are relative to the tile, so that no cast overflows.
    shift = tl.load(shift_ptr + rows, mask=row_mask, other=float("inf")).to(wide)
    if STATISTICS:
        largest = tl.max(z, axis=1)
        if TILE_RELATIVE:
            # Whole numbers: a power of two then brings what is stored to its row's shift, without rounding it again. A
            # bias of -inf can leave a tile without a finite logit.
            shift = tl.where(largest == float("-inf"), shift, tl.ceil(largest))
        else:
            shift = tl.where(largest - shift > LARGEST_EXPONENT, largest, shift)
    e = tl.exp2(z - shift[:, None])
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1) - first
    # At a vocabulary of 151,936 one in five tiles of 128 × 256 has a target.
    if tl.max(((target >= 0) & (target < BLOCK_COLUMNS)).to(tl.int32), axis=0) == 1:
        e = tl.where(within[None, :] == target[:, None], 0.0, e)
    if STATISTICS:
        at = (first // BLOCK_COLUMNS).to(tl.int64) * row_count + rows
        tl.store(tile_shift_ptr + at, shift, mask=row_mask)
        tl.store(tile_sum_ptr + at, tl.sum(e, axis=1), mask=row_mask)
    return e


@triton.jit(do_not_specialize=["row_count", "first_column"])
def softmax_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    shift_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    row_count,
    first_column,
    column_count,
    stride_logits_row,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`tile_exponentials` of products x Wᵀ in memory, (rows, column_count). With STORE they replace these."""
    column_tile = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    local = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (rows < row_count)[:, None] & (local < column_count)[None, :]
    places = logits_ptr + (rows[:, None].to(tl.int64) * stride_logits_row + local[None, :])
    e = tile_exponentials(
        tl.load(places, mask=mask, other=0.0) * LOG2_E,
        rows,
        first_column + column_tile * BLOCK_COLUMNS,
        first_column + column_count,
        row_count,
        bias_ptr,
        target_ptr,
        shift_ptr,
        tile_shift_ptr,
        tile_sum_ptr,
        HAS_BIAS,
        STATISTICS,
        False,
        BLOCK_COLUMNS,
    )
    if STORE:
        tl.store(places, e, mask=mask)
