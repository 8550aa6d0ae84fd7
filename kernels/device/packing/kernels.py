"""Triton: which tokens are unmasked, and sums over the unmasked tokens of each sequence."""

# Triton reads the annotations of jitted functions as objects, so their evaluation is not postponed in this module.
import triton
import triton.language as tl

__all__ = ["pack_targets_kernel", "sequence_sums_kernel"]


@triton.jit(do_not_specialize=["batch", "tokens", "vocabulary", "ignore_index"])
def pack_targets_kernel(
    target_ptr, row_ptr, packed_ptr, start_ptr, count_ptr, batch, tokens, vocabulary, ignore_index, BLOCK: tl.constexpr
):
    """An order of tokens that has unmasked ones first, and where in it each sequence begins; all int64.

    ``target`` is (batch, tokens), contiguous. ``row``, (batch · tokens,), gets flat indices of tokens: the unmasked
    ones in their order, then the masked ones in theirs. ``packed`` gets their targets. ``start``, (batch + 1,), ends
    with the number of unmasked ones. ``count``, (2,), gets that number, and how many of them are outside the
    vocabulary.

    It is one program, because the first product waits for it, and several small kernels took 0.3 ms.
    """
    size = batch * tokens
    unmasked = tl.zeros((BLOCK,), dtype=tl.int64)
    outside = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, size, BLOCK):
        places = first + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + places, mask=places < size, other=0)
        taken = (places < size) & (target != ignore_index)
        unmasked += taken.to(tl.int64)
        outside += (taken & ((target < 0) | (target >= vocabulary))).to(tl.int64)
    count = tl.sum(unmasked, axis=0)
    before = tl.zeros((), dtype=tl.int64)
    for first in range(0, size, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < size
        target = tl.load(target_ptr + places, mask=inside, other=0)
        taken = (inside & (target != ignore_index)).to(tl.int64)
        # How many unmasked tokens come before each.
        rank = before + tl.cumsum(taken, axis=0) - taken
        row = tl.where(taken != 0, rank, count + places - rank)
        tl.store(row_ptr + row, places.to(tl.int64), mask=inside)
        tl.store(packed_ptr + row, target, mask=inside)
        tl.store(start_ptr + places // tokens, rank, mask=inside & (places % tokens == 0))
        before += tl.sum(taken, axis=0)
    tl.store(start_ptr + batch, count)
    tl.store(count_ptr, count)
    tl.store(count_ptr + 1, tl.sum(outside, axis=0))


@triton.jit
def sequence_sums_kernel(value_ptr, start_ptr, sum_ptr, BLOCK: tl.constexpr):
    """Sums of ``value``, float64, over [start_b, start_{b + 1}): (batch,), float64. One program for each sum."""
    sequence = tl.program_id(0)
    stop = tl.load(start_ptr + sequence + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(tl.load(start_ptr + sequence), stop, BLOCK):
        places = first + tl.arange(0, BLOCK)
        total += tl.load(value_ptr + places, mask=places < stop, other=0.0)
    tl.store(sum_ptr + sequence, tl.sum(total, axis=0))
