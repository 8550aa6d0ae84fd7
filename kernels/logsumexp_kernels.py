"""Triton, forward: one pass over a tile of logits, which are never stored.

The product of hidden states and head is fused with the softmax statistics of its tile. Tiles are independent, so the
grid fills the GPU whatever the token count, and the reduction over tiles runs in a fixed order: results are
deterministic.
"""

# Triton reads the annotations of jitted functions; they must stay objects, so no postponed evaluation here.
import triton
import triton.language as tl

__all__ = ["reduce_tiles_kernel", "tile_statistics_kernel"]


@triton.jit
def logits_tile(
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
    HAS_BIAS: tl.constexpr,
    EVEN_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """z = x Wᵀ + b for a (BLOCK_ROWS, BLOCK_COLUMNS) tile, accumulated in ACCUMULATOR (float32 or float64).

    With PROMOTE > 0 the product restarts from zero every PROMOTE steps and its parts are added up outside. Tensor cores
    truncate the sum at every step: on an H100 sums of log-probabilities were off by 7e-7 at hidden size 4096 (2e-7 at
    1024, 2e-8 in float32), alike for all tokens, and KTO adds up the tokens of a whole sequence.

    Out-of-range rows and columns read row or column 0 of the tensors, which exist; callers mask what they store.
    """
    offsets = tl.arange(0, BLOCK_HIDDEN)
    safe_rows = tl.where(row_mask, rows, 0).to(tl.int64)
    safe_columns = tl.where(column_mask, columns, 0).to(tl.int64)
    x_ptrs = input_ptr + safe_rows[:, None] * stride_input_row + offsets[None, :].to(tl.int64) * stride_input_hidden
    w_ptrs = (
        weight_ptr + safe_columns[None, :] * stride_weight_row + offsets[:, None].to(tl.int64) * stride_weight_hidden
    )
    step = tl.full((), BLOCK_HIDDEN, tl.int64)
    part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=ACCUMULATOR)
    z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=ACCUMULATOR)
    for i in range(0, tl.cdiv(hidden, BLOCK_HIDDEN)):
        if EVEN_HIDDEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = i * BLOCK_HIDDEN + offsets < hidden
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        if UPCAST:
            # The interpreter's bfloat16 dot is wrong; the product of two upcast bfloat16 is exact in float32.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if PROMOTE > 0:
            part = tl.dot(x, w, part, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            if i % PROMOTE == PROMOTE - 1:
                z += part
                part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=ACCUMULATOR)
        else:
            z = tl.dot(x, w, z, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        x_ptrs += step * stride_input_hidden
        w_ptrs += step * stride_weight_hidden
    if PROMOTE > 0:
        z += part
    if HAS_BIAS:
        z += tl.load(bias_ptr + safe_columns).to(ACCUMULATOR)[None, :]
    return z


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share each stretch of the weight while it is in L2."""
    per_group = GROUP * column_tiles
    group = program // per_group
    first = group * GROUP
    size = min(row_tiles - first, GROUP)
    within = program % per_group
    return first + within % size, within // size


# Counts are not specialised: every divisibility by 16 of every count would be compiled apart, seconds each. Strides
# are, for wide loads depend on them.
@triton.jit(do_not_specialize=["row_count", "vocabulary", "hidden"])
def tile_statistics_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    target_logit_ptr,
    row_count,
    vocabulary,
    hidden,
    stride_input_row,
    stride_input_hidden,
    stride_weight_row,
    stride_weight_hidden,
    HAS_BIAS: tl.constexpr,
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
    """For each row and vocabulary tile: m = max_v z_v and s = Σ_v exp(z_v − m); for each row: z at its target.

    Writes ``tile_max`` and ``tile_sum``, (column tiles, rows), and ``target_logit``, (rows,), in the accumulator's
    dtype. A target outside the vocabulary matches no column and leaves its ``target_logit`` as it was.
    """
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(row_count, BLOCK_ROWS), tl.cdiv(vocabulary, BLOCK_COLUMNS), GROUP
    )
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < row_count
    column_mask = columns < vocabulary
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
    z = tl.where(column_mask[None, :], z, float("-inf"))
    maximum = tl.max(z, axis=1)
    total = tl.sum(tl.exp(z - maximum[:, None]), axis=1)
    statistics = column_tile.to(tl.int64) * row_count + rows
    tl.store(tile_max_ptr + statistics, maximum, mask=row_mask)
    tl.store(tile_sum_ptr + statistics, total, mask=row_mask)
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
    local = target - column_tile * BLOCK_COLUMNS
    here = row_mask & (local >= 0) & (local < BLOCK_COLUMNS) & (target < vocabulary)
    at_target = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
    tl.store(target_logit_ptr + rows, at_target, mask=here)


@triton.jit(do_not_specialize=["row_count", "tile_count"])
def reduce_tiles_kernel(
    tile_max_ptr,
    tile_sum_ptr,
    target_logit_ptr,
    logsumexp_ptr,
    token_logp_ptr,
    row_count,
    tile_count,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """lse = M + log Σ_j s_j exp(m_j − M) with M = max_j m_j, and log π(y) = z_y − lse; in float64 throughout.

    KTO puts a sigmoid on a sum over thousands of tokens: float64 here costs nothing (one value a tile) and leaves the
    product itself as the only source of error.
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
        m = tl.load(tile_max_ptr + at, mask=mask, other=float("-inf")).to(tl.float64)
        s = tl.load(tile_sum_ptr + at, mask=mask, other=0.0).to(tl.float64)
        new_maximum = tl.maximum(maximum, tl.max(m, axis=0))
        # Rows past the end stay at −inf: subtracting it from itself would give NaN.
        shift = tl.where(row_mask, new_maximum, 0.0)
        total = total * tl.exp(maximum - shift) + tl.sum(s * tl.exp(m - shift[None, :]), axis=0)
        maximum = new_maximum
    logsumexp = maximum + tl.log(tl.where(row_mask, total, 1.0))
    target_logit = tl.load(target_logit_ptr + rows, mask=row_mask, other=0.0).to(tl.float64)
    tl.store(logsumexp_ptr + rows, logsumexp, mask=row_mask)
    tl.store(token_logp_ptr + rows, target_logit - logsumexp, mask=row_mask)
