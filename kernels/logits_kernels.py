"""Triton: tiles of logits, of which only softmax statistics and, where asked for, exponentials are stored.

The product of hidden states and head is fused with what the softmax needs of its tile. Tiles are independent, so the
grid fills the GPU whatever the token count, and the reduction over tiles runs in a fixed order: results are
deterministic.

Everything is in units of log 2 (z₂ = z log₂ e), in which the hardware's exponential is.
"""

# Triton reads the annotations of jitted functions; they must stay objects, so no postponed evaluation here.
import triton
import triton.language as tl

__all__ = ["LARGEST_EXPONENT", "LOG2_E", "grouped_tile", "logits_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)
#: Exponentials up to 2^80 are stored relative to the target's logit. Their row's factor, down to 2^-80, times a small
#: coefficient is still far from bfloat16's and float32's underflow at 2^-126.
LARGEST_EXPONENT = tl.constexpr(80.0)


@triton.jit
def grouped_tile(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile's number: GROUP row tiles share each stretch of columns while it is in L2."""
    per_group = GROUP * column_tiles
    group = tile // per_group
    first = group * GROUP
    size = min(row_tiles - first, GROUP)
    within = tile % per_group
    return first + within % size, within // size


@triton.jit
def products_from_pointers(
    input_ptr,
    weight_ptr,
    rows,
    row_mask,
    columns,
    column_mask,
    hidden,
    stride_input_row,
    stride_input_hidden,
    stride_weight_row,
    stride_weight_hidden,
    EVEN_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """x Wᵀ for a (BLOCK_ROWS, BLOCK_COLUMNS) tile and any strides.

    With PROMOTE > 0 the product restarts from zero every PROMOTE steps and its parts are added up outside, for tensor
    cores truncate the sum at every step (see docs/kernels.md).

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
    return z


@triton.jit
def products_from_descriptors(
    input,
    weight,
    first_row,
    first_column,
    hidden,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The same through tensor descriptors, whose loads a copy engine does; beyond a tensor's edges they give 0."""
    z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for i in range(0, tl.cdiv(hidden, BLOCK_HIDDEN)):
        x = input.load([first_row, i * BLOCK_HIDDEN])
        w = weight.load([first_column, i * BLOCK_HIDDEN])
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(x, w.T, z)
    return z


# Counts are not specialised: every divisibility by 16 of every count would be compiled apart, seconds each. Strides
# are, for wide loads depend on them.
@triton.jit(do_not_specialize=["row_count", "first_column", "column_count", "hidden", "scale"])
def logits_kernel(
    input,
    weight,
    slab,
    bias_ptr,
    target_ptr,
    shift_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    row_count,
    first_column,
    column_count,
    hidden,
    scale,
    stride_input_row,
    stride_input_hidden,
    stride_weight_row,
    stride_weight_hidden,
    stride_slab_row,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    TILE_RELATIVE: tl.constexpr,
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
    """e_tv = 2^(z₂_tv − m) for the columns [first_column, first_column + column_count), with z₂ = scale (x Wᵀ) + b₂.

    e is 0 at the target: with S = Σ_{v ≠ y} e_v, relative to the target's own logit, 1 − p_y = S / (1 + S) keeps its
    digits however near 1 p_y is. (A sum that includes the target has an error of 1e-7 of 1, not of S.)

    ``input``, ``weight`` and ``slab`` are tensor descriptors, or pointers with strides. ``shift``, (rows,), is s_t.

    With STATISTICS every (row, tile) has an m of its own, the row's s_t unless the tile's largest exponent would pass
    LARGEST_EXPONENT, then (and always if TILE_RELATIVE) the largest z₂; m and Σ_v e_tv go to ``tile_shift`` and
    ``tile_sum``, (column tiles of the vocabulary, rows), in the accumulator's dtype. Without it m = s_t.

    With STORE, SLAB_SCALE e_tv goes to ``slab``, (rows, column_count), rounded to its dtype.
    """
    row_tiles = tl.cdiv(row_count, BLOCK_ROWS)
    column_tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    # Flattened, a tile's first loads are under way while the one before is finished: see benchmarks/notes.md.
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
        rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        local = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        columns = first_column + local
        row_mask = rows < row_count
        column_mask = local < column_count
        if DESCRIPTORS:
            z = products_from_descriptors(
                input,
                weight,
                row_tile * BLOCK_ROWS,
                first_column + column_tile * BLOCK_COLUMNS,
                hidden,
                UPCAST,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_HIDDEN,
            )
        else:
            z = products_from_pointers(
                input,
                weight,
                rows,
                row_mask,
                columns,
                column_mask,
                hidden,
                stride_input_row,
                stride_input_hidden,
                stride_weight_row,
                stride_weight_hidden,
                EVEN_HIDDEN,
                UPCAST,
                ACCUMULATOR,
                PRECISION,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_HIDDEN,
                PROMOTE,
            )
        # A number handed to a kernel arrives as float32.
        z = z * LOG2_E if ACCUMULATOR == tl.float64 else z * scale
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(ACCUMULATOR)
            z += (bias * LOG2_E)[None, :]
        if (column_tile + 1) * BLOCK_COLUMNS > column_count:
            z = tl.where(column_mask[None, :], z, float("-inf"))
        # Rows past the end get e = 0 where nothing is relative to the tile: no cast overflows.
        shift = tl.load(shift_ptr + rows, mask=row_mask, other=float("inf")).to(ACCUMULATOR)
        if STATISTICS:
            largest = tl.max(z, axis=1)
            if TILE_RELATIVE:
                # A bias of -inf can leave a tile without a finite logit.
                shift = tl.where(largest == float("-inf"), shift, largest)
            else:
                shift = tl.where(largest - shift > LARGEST_EXPONENT, largest, shift)
        e = tl.exp2(z - shift[:, None])
        target = tl.load(target_ptr + rows, mask=row_mask, other=-1) - (first_column + column_tile * BLOCK_COLUMNS)
        # Of 128 × 256 tiles of a vocabulary of 151,936 one in five has a target.
        if tl.max(((target >= 0) & (target < BLOCK_COLUMNS)).to(tl.int32), axis=0) == 1:
            e = tl.where(tl.arange(0, BLOCK_COLUMNS)[None, :] == target[:, None], 0.0, e)
        if STATISTICS:
            at = (first_column // BLOCK_COLUMNS + column_tile).to(tl.int64) * row_count + rows
            tl.store(tile_shift_ptr + at, shift, mask=row_mask)
            tl.store(tile_sum_ptr + at, tl.sum(e, axis=1), mask=row_mask)
        if STORE:
            if SLAB_SCALE != 1.0:
                e *= SLAB_SCALE
            if DESCRIPTORS:
                # In halves: a whole tile in shared memory would cost the loads a stage of their pipeline.
                halves = tl.permute(tl.reshape(e, (BLOCK_ROWS, 2, BLOCK_COLUMNS // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                at_column = column_tile * BLOCK_COLUMNS
                slab.store([row_tile * BLOCK_ROWS, at_column], left.to(slab.dtype))
                slab.store([row_tile * BLOCK_ROWS, at_column + BLOCK_COLUMNS // 2], right.to(slab.dtype))
            else:
                at_slab = slab + (rows[:, None].to(tl.int64) * stride_slab_row + local[None, :])
                mask = row_mask[:, None] & column_mask[None, :]
                tl.store(at_slab, e.to(slab.dtype.element_ty), mask=mask)
