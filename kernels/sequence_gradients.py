"""Gradients of sequences' log-probabilities, on plain tensors.

`ktonum.kernels.autograd` makes a differentiable operator of this and `ktonum.kernels.sequences`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ktonum.kernels import launch, launch_gradients
from ktonum.kernels.launch_gradients import Rows, Slab, SortedTargets
from ktonum.kernels.products import accumulator_dtype, add_product, full_precision_products
from ktonum.kernels.sequences import Head, SequenceSums, contiguous
from ktonum.kernels.slabs import SlabPlan

__all__ = ["sequence_gradients"]

# Vocabulary entries that one product adds up: tensor cores lose 1e-9 of a sum for each of its terms, so 3e-5 of it.
_ADDED_AT_ONCE = 2**15


def sequence_gradients(
    head: Head, upstream: Tensor, sums: SequenceSums, *, wanted: tuple[bool, bool, bool], workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor in the place of each that is not wanted.

    Args:
        head: As for the forward.
        upstream: ∂L/∂logps, (B,), float64.
        sums: The forward's result; its ``logps`` are not read.
        wanted: Which of the three to compute.
        workspace: Bytes that exponentials may take.
    """
    input, weight, target = head.input, head.weight, head.target
    input_gradient, weight_gradient, bias_gradient = wanted
    batch, tokens = target.shape
    hidden, vocabulary = input.shape[-1], weight.shape[0]
    wide = accumulator_dtype(input.dtype)
    places = sums.packing.rows[: sums.packing.count]
    rows = _rows(head, upstream, sums)
    grad_weight = weight.new_empty(weight.shape if weight_gradient else 0)
    grad_bias = torch.zeros(vocabulary if bias_gradient else 0, dtype=wide, device=weight.device)
    if len(places) == 0:
        grad_weight.zero_()
    x_sums: Tensor | None = None
    weighted_x = launch_gradients.scaled_rows(rows.input, rows.elsewhere) if weight_gradient else None
    with full_precision_products(input.device, allow_tf32=head.allow_tf32):
        for slab in _slabs(head, rows, sums, workspace, grad_weight):
            part = slice(slab.first_column, slab.first_column + slab.exponentials.shape[1])
            if input_gradient:
                x_sums = _add_input_products(x_sums, slab.exponentials, weight[part])
            if weighted_x is not None:
                launch_gradients.weight_gradient(grad_weight[part], slab, rows, weighted_x)
            if bias_gradient:
                launch_gradients.bias_gradient(grad_bias[part], slab, rows)
    # Not before the last slab is gone, nor what stands in for the hidden states.
    del weighted_x
    grad_input = input.new_zeros((batch * tokens, hidden) if input_gradient else 0)
    if x_sums is not None:
        launch_gradients.input_gradient(grad_input, places, x_sums, weight, rows)
    if input_gradient:
        grad_input = grad_input.view(batch, tokens, hidden)
    return grad_input, grad_weight, grad_bias.to(weight.dtype)


def _rows(head: Head, upstream: Tensor, sums: SequenceSums) -> Rows:
    count = sums.packing.count
    x, y = sums.packing.pack(head.input, head.target)
    wide = accumulator_dtype(x.dtype)
    logps, _, factor = sums.statistics[:, :count]
    # c_t = ∂L/∂log π(y_t) is its sequence's upstream gradient, 0 for masked tokens.
    c = torch.where(
        y != head.ignore_index, upstream.index_select(0, sums.packing.rows[:count] // head.target.shape[1]), 0.0
    )
    # a_t = c_t (1 − p_{t,y_t}), without cancellation where p is near 1.
    at_target = -torch.expm1(logps) * c
    elsewhere, scale = _in_range(-factor * c)
    targets = SortedTargets.of(y, head.weight.shape[0])
    return Rows(x, y, targets, at_target.to(wide), elsewhere.to(wide), scale.to(wide))


def _in_range(factors: Tensor) -> tuple[Tensor, Tensor]:
    """``factors``, (N,), over a power of two that brings the largest to [1/2, 1), and that power, a scalar.

    A saturated sigmoid makes coefficients of 1e-14, an unlikely target factors of 1e-24: products of both would be
    subnormal in float32 and bfloat16, and either one in float16.
    """
    if factors.numel() == 0:
        return factors, factors.new_ones(())
    _, exponent = torch.frexp(factors.abs().amax())
    scale = torch.exp2(exponent.clamp(-100, 100).to(factors.dtype))
    return factors / scale, scale


def _slabs(head: Head, rows: Rows, sums: SequenceSums, workspace: int, grad_weight: Tensor) -> Iterator[Slab]:
    """All exponentials: the stored ones, then the others, each slab in the memory of the one before.

    The rows of ``grad_weight`` are written slab by slab, once a slab has been used: until then those behind it hold the
    slab itself, so that few and wide slabs need no memory of their own.
    """
    stored, dtype = sums.exponentials, head.input.dtype
    count = len(rows.target)
    plan = SlabPlan.of(count, head.weight.shape[0], stored.numel())
    if (slab := plan.stored(stored)) is not None:
        # Of another dtype in the interpreter alone, which does not round to bfloat16 rightly.
        yield Slab(slab.to(dtype), 0)
    spare = head.input.shape[-1] if grad_weight.numel() and stored.dtype == grad_weight.dtype else 0
    size = plan.computed_size(workspace, stored.itemsize, spare)
    buffer = torch.empty(size, dtype=stored.dtype, device=stored.device)
    bias = contiguous(head.bias)
    for first, last, fits in plan.computed(workspace, stored.itemsize, spare):
        slab = plan.within(grad_weight[last:].view(-1) if fits else buffer, last - first)
        launch.exponentials(
            rows.input,
            head.weight,
            bias,
            rows.target,
            sums.statistics[1, :count],
            slab=slab,
            first_column=first,
            allow_tf32=head.allow_tf32,
        )
        yield Slab(slab.to(dtype), first)


def _add_input_products(sums: Tensor | None, exponentials: Tensor, weight: Tensor) -> Tensor:
    """``sums + exponentials @ weight`` in the accumulator's dtype, (N, H)."""
    if sums is None:
        wide = accumulator_dtype(weight.dtype)
        sums = torch.zeros(exponentials.shape[0], weight.shape[1], dtype=wide, device=weight.device)
    for first in range(0, exponentials.shape[1], _ADDED_AT_ONCE):
        part = slice(first, first + _ADDED_AT_ONCE)
        add_product(sums, exponentials[:, part], weight[part])
    return sums
