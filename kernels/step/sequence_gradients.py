"""Gradients of sequences' log-probabilities, on plain tensors.

`ktonum.kernels.step.autograd` makes a differentiable function of this and `ktonum.kernels.step.sequences`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.kernels.device.gradients import launch as launch_gradients
from ktonum.kernels.device.gradients.launch import Rows, SortedTargets
from ktonum.kernels.device.products import accumulator_dtype, add_product, full_precision_products, product
from ktonum.kernels.device.slabs import Slab, SlabPlan
from ktonum.kernels.device.statistics import launch
from ktonum.kernels.device.sums.launch import row_coefficients, scale_rows
from ktonum.kernels.step.sequences import Head, SequenceSums, projection

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
        sums: The forward's result; its ``logps`` are not read, and its ``gradient`` is overwritten, by the weight's
            gradient if that is wanted.
        wanted: Which of the three to compute.
        workspace: Bytes that exponentials may take.
    """
    weight, weight_wanted = head.weight, wanted[1]
    count, tokens = sums.packing.count, head.target.shape[1]
    if count == 0:
        return _nothing(head, wanted)
    memory = sums.gradient
    if memory is None and weight_wanted:
        memory = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    scored, places = projection(head, sums.packing), sums.packing.rows[:count]
    statistics = launch.RowStatistics(*sums.statistics[:, :count].unbind())
    coefficients = row_coefficients(
        upstream, statistics, scored.target, places, tokens=tokens, ignore_index=head.ignore_index, dtype=weight.dtype
    )
    rows = Rows(scored.input, scored.target, SortedTargets.of(scored.target, weight.shape[0]), coefficients)
    gradients = _Gradients(rows, weight, wanted, memory)
    stored = sums.exponentials
    plan = SlabPlan.of(
        count,
        weight.shape[0],
        stored.numel(),
        hidden=weight.shape[1] if memory is not None and memory.dtype == stored.dtype else 0,
        in_gradient=sums.gradient is not None,
    )
    own: Tensor | None = None
    slab: Slab | None = None
    with full_precision_products(weight.device, allow_tf32=head.allow_tf32):
        for slab in plan.stored(stored, memory):
            gradients.add(slab)
        for stretch in plan.computed(workspace, stored.itemsize):
            if stretch.place is None:
                if plan.instead_of_input(workspace, stored.itemsize):
                    gradients.drop_weighted_input()
                own = stored.new_empty(plan.own_size(workspace, stored.itemsize)) if own is None else own
                slab = plan.slab(stretch, own)
            else:
                assert memory is not None  # a plan without it has no places in it
                slab = plan.slab(stretch, memory)
            launch.exponentials(scored, statistics.shift, slab=slab)
            gradients.add(slab)
    # What is no longer read goes before the last large tensor is made.
    gradients.drop_weighted_input()
    del own, slab
    grad_input = weight.new_empty(0)
    if gradients.input_sums is not None:
        everywhere = count == head.target.numel()
        grad_input = (weight.new_empty if everywhere else weight.new_zeros)((head.target.numel(), weight.shape[1]))
        launch_gradients.input_gradient(grad_input, places, gradients.input_sums, weight, rows)
        grad_input = grad_input.view(head.input.shape)
    grad_weight = memory if memory is not None and weight_wanted else weight.new_empty(0)
    return grad_input, grad_weight, gradients.bias.to(weight.dtype)


def _nothing(head: Head, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (head.input.shape, head.weight.shape, (head.weight.shape[0],))
    zeros = [head.weight.new_zeros(shape if w else 0) for shape, w in zip(shapes, wanted, strict=True)]
    return zeros[0], zeros[1], zeros[2]


class _Gradients:
    """What has been added up, slab by slab.

    Attributes:
        input_sums: Σ_v e_tv w_v, (N, H), accumulator's dtype; None before the first slab, or if not wanted.
        bias: (V,), accumulator's dtype; empty if not wanted.
    """

    def __init__(self, rows: Rows, weight: Tensor, wanted: tuple[bool, bool, bool], grad_weight: Tensor | None) -> None:
        self._rows, self._weight, self._wanted, self._grad_weight = rows, weight, wanted, grad_weight
        self.input_sums: Tensor | None = None
        wide = accumulator_dtype(weight.dtype)
        self.bias = torch.empty(weight.shape[0] if wanted[2] else 0, dtype=wide, device=weight.device)
        # −f_t c_t x_t / scale
        self._weighted_input: Tensor | None = None
        if wanted[1]:
            self._weighted_input = torch.empty(rows.input.shape, dtype=weight.dtype, device=weight.device)
            scale_rows(rows.input, rows.coefficients.elsewhere, self._weighted_input)

    def add(self, slab: Slab) -> None:
        """Add what a slab counts; its exponentials are overwritten if the weighted hidden states were dropped."""
        # Of another dtype in the interpreter alone, which does not round to bfloat16 rightly.
        slab = Slab(slab.exponentials.to(self._weight.dtype), slab.first_column)
        e, part = slab.exponentials, slice(slab.first_column, slab.first_column + slab.exponentials.shape[1])
        if self._wanted[0]:
            self.input_sums = _add_input_products(self.input_sums, e, self._weight[part])
        if self._wanted[2]:
            launch_gradients.bias_gradient(self.bias[part], slab, self._rows)
        if self._wanted[1] and self._grad_weight is not None:
            x = self._weighted_input
            if x is None:
                scale_rows(e, self._rows.coefficients.elsewhere, e)
                x = self._rows.input
            launch_gradients.weight_gradient(self._grad_weight[part], slab, self._rows, x)

    def drop_weighted_input(self) -> None:
        """Free the hidden states' copy; slabs are weighted instead from now on."""
        self._weighted_input = None


def _add_input_products(sums: Tensor | None, exponentials: Tensor, weight: Tensor) -> Tensor:
    """``sums + exponentials @ weight`` in the accumulator's dtype, (N, H)."""
    for first in range(0, exponentials.shape[1], _ADDED_AT_ONCE):
        part = slice(first, first + _ADDED_AT_ONCE)
        if sums is None:
            sums = product(exponentials[:, part], weight[part])
        else:
            add_product(sums, exponentials[:, part], weight[part])
    assert sums is not None  # no slab is empty
    return sums
