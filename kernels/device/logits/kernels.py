"""Triton: tiles of logits, of which only softmax statistics and, if the caller wants them, exponentials are stored.

The product of hidden states and head is fused with what the softmax needs from its tile. Tiles are independent, so the
grid fills the GPU whatever the number of tokens. The reduction over tiles runs in a fixed order, so results are
deterministic. Operands have 16 bits. The library computes products of wider ones, see `softmax_kernel`.
"""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

from ktonum.kernels.device.softmax.kernels import tile_exponentials

__all__ = ["grouped_tile", "logits_kernel"]


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """x Wᵀ for a (BLOCK_ROWS, BLOCK_COLUMNS) tile and any strides.

    With PROMOTE > 0 the product restarts from zero every PROMOTE steps, and its parts are added up outside the tensor
    cores, because these truncate the sum at every step (see docs/kernels.md).

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
    part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
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
            part = tl.dot(x, w, part)
            if i % PROMOTE == PROMOTE - 1:
                z += part
                part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        else:
            z = tl.dot(x, w, z)
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
    """The same through tensor descriptors: Hopper's copy engine (TMA) loads the tiles, 0 beyond a tensor's edges."""
    z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for i in range(0, tl.cdiv(hidden, BLOCK_HIDDEN)):
        x = input.load([first_row, i * BLOCK_HIDDEN])
        w = weight.load([first_column, i * BLOCK_HIDDEN])
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(x, w.T, z)
    return z


# Counts are not specialised, because each combination of counts that are divisible by 16 would be compiled apart, for
# several seconds each. Strides are specialised, because wide loads depend on them. The limit is one number, at any
# place.
@triton.jit(do_not_specialize=["limit_ptr", "row_count", "first_column", "column_count", "hidden", "scale"])
def logits_kernel(
    input,
    weight,
    slab,
    bias_ptr,
    target_ptr,
    shift_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    limit_ptr,
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
    HAS_LIMIT: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    TILE_RELATIVE: tl.constexpr,
    SLAB_SCALE: tl.constexpr,
    EVEN_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PROMOTE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`tile_exponentials` of the columns [first_column, first_column + column_count), with z₂ = scale (x Wᵀ) + b₂.

    ``input``, ``weight`` and ``slab`` are tensor descriptors, or pointers with strides. With STORE, SLAB_SCALE e_tv
    goes to ``slab``, (rows, column_count), rounded to its dtype. With HAS_LIMIT only as many rows are needed as the
    number at ``limit``, int64, says.
    """
    row_tiles = tl.cdiv(row_count, BLOCK_ROWS)
    if HAS_LIMIT:
        row_tiles = tl.cdiv(tl.load(limit_ptr).to(tl.int32), BLOCK_ROWS)
    column_tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    # Flattened, so that a tile's first loads are under way while the tile before is finished: see benchmarks/notes.md.
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
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_HIDDEN,
                PROMOTE,
            )
        e = tile_exponentials(
            z * scale,
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
            TILE_RELATIVE,
            BLOCK_COLUMNS,
        )
        if STORE:
            if SLAB_SCALE != 1.0:
                e *= SLAB_SCALE
            if DESCRIPTORS:
                # In halves, because a whole tile in shared memory would take a stage from the pipeline of the loads.
                halves = tl.permute(tl.reshape(e, (BLOCK_ROWS, 2, BLOCK_COLUMNS // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                at_column = column_tile * BLOCK_COLUMNS
                slab.store([row_tile * BLOCK_ROWS, at_column], left.to(slab.dtype))
                slab.store([row_tile * BLOCK_ROWS, at_column + BLOCK_COLUMNS // 2], right.to(slab.dtype))
            else:
                at_slab = slab + (rows[:, None].to(tl.int64) * stride_slab_row + local[None, :])
                mask = row_mask[:, None] & column_mask[None, :]
                tl.store(at_slab, e.to(slab.dtype.element_ty), mask=mask)
