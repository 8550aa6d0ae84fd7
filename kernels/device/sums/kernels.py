"""Triton: sums of hidden states and heads, and the rows' coefficients, in one launch each.

A launch costs the host 20 to 70 µs, which a small batch waits for. PyTorch makes a dozen launches of each of these.
"""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

__all__ = [
    "column_sums_kernel",
    "input_sums_kernel",
    "logit_sums_kernel",
    "row_coefficients_kernel",
    "scale_rows_kernel",
]


@triton.jit(do_not_specialize=["row_count", "rows_each"])
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


@triton.jit(do_not_specialize=["tokens", "tokens_each", "stretches", "column_stretches"])
def input_sums_kernel(
    input_ptr,
    column_sum_ptr,
    column_largest_ptr,
    part_ptr,
    tokens,
    tokens_each,
    stretches,
    column_stretches,
    hidden,
    stride_input_sequence,
    stride_input_row,
    stride_input_hidden,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_STRETCHES: tl.constexpr,
):
    """Parts of Σ_h (Σ_t x_th) (Σ_v w_vh) and of Σ_h max |x_h| max |w_h|: (2, sequences × stretches of T, H tiles).

    float64, but for sums over tokens, which are in the dtype of ``column_largest``.
    """
    sequence = tl.program_id(0) // stretches
    stretch = tl.program_id(0) % stretches
    offsets = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = offsets < hidden
    total = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), dtype=column_largest_ptr.dtype.element_ty)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), dtype=column_largest_ptr.dtype.element_ty)
    start = input_ptr + sequence.to(tl.int64) * stride_input_sequence
    stop = tl.minimum((stretch + 1) * tokens_each, tokens)
    for first in range(stretch * tokens_each, stop, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        at = rows[:, None].to(tl.int64) * stride_input_row + offsets[None, :].to(tl.int64) * stride_input_hidden
        x = tl.load(start + at, mask=(rows < stop)[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += x
        largest = tl.maximum(largest, tl.abs(x))
    weight = tl.zeros((BLOCK_STRETCHES, BLOCK_HIDDEN), dtype=tl.float64)
    weight_largest = tl.zeros((BLOCK_STRETCHES, BLOCK_HIDDEN), dtype=column_largest_ptr.dtype.element_ty)
    # Several at a time, so that the reads of 64 stretches do not wait for each other.
    for first in range(0, column_stretches, BLOCK_STRETCHES):
        stretches_here = first + tl.arange(0, BLOCK_STRETCHES)
        at = stretches_here[:, None].to(tl.int64) * hidden + offsets[None, :]
        there = (stretches_here < column_stretches)[:, None] & inside[None, :]
        weight += tl.load(column_sum_ptr + at, mask=there, other=0.0)
        weight_largest = tl.maximum(weight_largest, tl.load(column_largest_ptr + at, mask=there, other=0.0))
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    sums = tl.sum(total.to(tl.float64), axis=0)
    tl.store(part_ptr + place, tl.sum(sums * tl.sum(weight, axis=0), axis=0))
    # The sum over hidden entries of the largest products. No partial sum of a logit is larger.
    largest_product = tl.max(largest, axis=0).to(tl.float64) * tl.max(weight_largest, axis=0).to(tl.float64)
    parts = tl.num_programs(0) * tl.num_programs(1)
    tl.store(part_ptr + parts + place, tl.sum(largest_product, axis=0))


@triton.jit(do_not_specialize=["batch", "parts", "tokens", "vocabulary"])
def logit_sums_kernel(
    part_ptr,
    bias_ptr,
    sum_ptr,
    sound_ptr,
    batch,
    parts,
    tokens,
    vocabulary,
    HAS_BIAS: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the parts of each sequence, from `input_sums_kernel`, plus ``tokens`` Σ_v b_v: (batch,), float64.

    ``sound``, (2,), float64, gets the largest bound, and the sum of all sums. One program reads it all: a few thousand
    numbers at most, and the bias.
    """
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    bias_largest = tl.zeros((BLOCK,), dtype=tl.float64)
    if HAS_BIAS:
        for first in range(0, vocabulary, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            bias = tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float64)
            bias_sum += bias
            bias_largest = tl.maximum(bias_largest, tl.abs(bias))
    added = tl.sum(bias_sum, axis=0) * tokens
    largest = tl.zeros((BLOCK_SEQUENCES,), dtype=tl.float64)
    total = tl.zeros((BLOCK_SEQUENCES,), dtype=tl.float64)
    width: tl.constexpr = BLOCK // BLOCK_SEQUENCES
    for first in range(0, batch, BLOCK_SEQUENCES):
        sequences = first + tl.arange(0, BLOCK_SEQUENCES)
        sums = tl.zeros((BLOCK_SEQUENCES, width), dtype=tl.float64)
        bounds = tl.zeros((BLOCK_SEQUENCES, width), dtype=tl.float64)
        for part in range(0, parts, width):
            which = part + tl.arange(0, width)
            at = sequences.to(tl.int64)[:, None] * parts + which[None, :]
            mask = (sequences < batch)[:, None] & (which < parts)[None, :]
            sums += tl.load(part_ptr + at, mask=mask, other=0.0)
            bounds += tl.load(part_ptr + batch * parts + at, mask=mask, other=0.0)
        of_sequences = tl.where(sequences < batch, tl.sum(sums, axis=1) + added, 0.0)
        tl.store(sum_ptr + sequences, of_sequences, mask=sequences < batch)
        total += of_sequences
        largest = tl.maximum(largest, tl.sum(bounds, axis=1))
    tl.store(sound_ptr, tl.max(largest, axis=0) + tl.max(bias_largest, axis=0))
    # This sum is finite if and only if each of them is, because they are far from float64's largest number.
    tl.store(sound_ptr + 1, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["row_count", "tokens", "ignore_index"])
def row_coefficients_kernel(
    upstream_ptr,
    others_ptr,
    factor_ptr,
    target_ptr,
    place_ptr,
    at_target_ptr,
    elsewhere_ptr,
    scale_ptr,
    row_count,
    tokens,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """a_t = c_t (1 − p_{t,y_t}), −f_t c_t / scale and the scale; c_t is ``upstream`` at place_t // tokens, or 0.

    It reads float64 and writes the dtype of ``at_target``. One program, because the scale depends on the largest factor
    of all rows.
    """
    largest = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, row_count, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < row_count
        taken = mask & (tl.load(target_ptr + rows, mask=mask, other=0) != ignore_index)
        place = tl.load(place_ptr + rows, mask=mask, other=0)
        c = tl.load(upstream_ptr + place // tokens, mask=taken, other=0.0)
        a = c * tl.load(others_ptr + rows, mask=mask, other=0.0)
        tl.store(at_target_ptr + rows, a.to(at_target_ptr.dtype.element_ty), mask=mask)
        largest = tl.maximum(largest, tl.abs(c * tl.load(factor_ptr + rows, mask=mask, other=0.0)))
    # The exponent that brings the largest to [1/2, 1), read off its bits.
    exponent = ((tl.max(largest, axis=0).to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    scale = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    tl.store(scale_ptr, scale.to(scale_ptr.dtype.element_ty))
    for first in range(0, row_count, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < row_count
        taken = mask & (tl.load(target_ptr + rows, mask=mask, other=0) != ignore_index)
        place = tl.load(place_ptr + rows, mask=mask, other=0)
        c = tl.load(upstream_ptr + place // tokens, mask=taken, other=0.0)
        elsewhere = -c * tl.load(factor_ptr + rows, mask=mask, other=0.0) / scale
        tl.store(elsewhere_ptr + rows, elsewhere.to(elsewhere_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_count"])
def scale_rows_kernel(
    rows_ptr,
    factor_ptr,
    scaled_ptr,
    row_count,
    column_count,
    stride_rows_row,
    stride_rows_hidden,
    stride_scaled_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``scaled_t`` = factor_t rows_t, the product in the factors' dtype, rounded to its own; (rows, columns).

    PyTorch's multiplication of two dtypes into a third took 0.16 ms of a 56 ms step on an H100; the bytes need 0.05.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offsets = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    mask = (rows < row_count)[:, None] & (offsets < column_count)[None, :]
    factor = tl.load(factor_ptr + rows, mask=rows < row_count, other=0.0)
    at = rows.to(tl.int64)[:, None] * stride_rows_row + offsets[None, :] * stride_rows_hidden
    x = tl.load(rows_ptr + at, mask=mask, other=0.0).to(factor.dtype)
    place = rows.to(tl.int64)[:, None] * stride_scaled_row + offsets[None, :]
    tl.store(scaled_ptr + place, (factor[:, None] * x).to(scaled_ptr.dtype.element_ty), mask=mask)
