"""Gradients of sequences' log-probabilities, on plain tensors: the backward of `ktonum.kernels.step.sequences`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ktonum.kernels.device.gradients import launch as launch_gradients
from ktonum.kernels.device.gradients.launch import Rows, SortedTargets
from ktonum.kernels.device.products import accumulator_dtype, add_product, full_precision_products, product
from ktonum.kernels.device.slabs import Slab, SlabPlan, Workspace
from ktonum.kernels.device.statistics import launch
from ktonum.kernels.device.sums.launch import row_coefficients, scale_rows
from ktonum.kernels.device.trace import note
from ktonum.kernels.step.sequences import Head, SequenceSums, projection

__all__ = ["Wanted", "refuse_second_derivative", "sequence_gradients"]

# Vocabulary entries that one product adds up. Tensor cores lose 1e-9 of a sum for each of its terms, here 3e-5 of it.
_ADDED_AT_ONCE = 2**15


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    input: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether there is anything to compute."""
        return self.input or self.weight or self.bias

    def select(self, gradients: tuple[Tensor, Tensor, Tensor]) -> list[Tensor | None]:
        """``gradients`` of input, weight and bias, with None in the place of each that is not wanted."""
        wanted = (self.input, self.weight, self.bias)
        return [gradient if chosen else None for gradient, chosen in zip(gradients, wanted, strict=True)]


def refuse_second_derivative(*_: object) -> NoReturn:
    """The backward of the gradients.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "the KTO kernels have no second derivative (create_graph=True, or a backward through a gradient): use "
        "ktonum.kernels.ReferenceKTOLoss for it"
    )


def sequence_gradients(
    head: Head, upstream: Tensor, sums: SequenceSums, *, wanted: Wanted, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, with an empty tensor in the place of each that is not wanted.

    Args:
        head: As for the forward.
        upstream: ∂L/∂logps, (B,), float64.
        sums: The forward's result. Its ``logps`` are not read. Its ``gradient`` is overwritten: with the weight's
            gradient, if that is wanted.
        wanted: Which of the three to compute.
        workspace: As for the forward.
    """
    weight = head.weight
    count, tokens = sums.packing.count, head.target.shape[1]
    if count == 0:
        return _nothing(head, wanted)
    memory = sums.gradient
    if memory is None and wanted.weight:
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
                assert memory is not None  # without this memory a plan puts nothing into it
                slab = plan.slab(stretch, memory)
            launch.exponentials(scored, statistics.shift, slab=slab)
            gradients.add(slab)
    # Free what is no longer read before the last large tensor is allocated.
    gradients.drop_weighted_input()
    del own, slab
    grad_input = weight.new_empty(0)
    if gradients.input_sums is not None:
        everywhere = count == head.target.numel()
        grad_input = (weight.new_empty if everywhere else weight.new_zeros)((head.target.numel(), weight.shape[1]))
        launch_gradients.input_gradient(grad_input, places, gradients.input_sums, weight, rows)
        grad_input = grad_input.view(head.input.shape)
    grad_weight = memory if memory is not None and wanted.weight else weight.new_empty(0)
    return grad_input, grad_weight, gradients.bias.to(weight.dtype)


def _nothing(head: Head, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    zeros, weight = head.weight.new_zeros, head.weight
    return (
        zeros(head.input.shape if wanted.input else 0),
        zeros(weight.shape if wanted.weight else 0),
        zeros(len(weight) if wanted.bias else 0),
    )


class _Gradients:
    """The sums over the vocabulary, as slabs are added.

    Attributes:
        input_sums: Σ_v e_tv w_v, (N, H), accumulator's dtype; None before the first slab, or if not wanted.
        bias: (V,), accumulator's dtype; empty if not wanted.
    """

    def __init__(self, rows: Rows, weight: Tensor, wanted: Wanted, grad_weight: Tensor | None) -> None:
        self._rows, self._weight, self._wanted, self._grad_weight = rows, weight, wanted, grad_weight
        self.input_sums: Tensor | None = None
        wide = accumulator_dtype(weight.dtype)
        self.bias = torch.empty(weight.shape[0] if wanted.bias else 0, dtype=wide, device=weight.device)
        # −f_t c_t x_t / scale
        self._weighted_input: Tensor | None = None
        if wanted.weight:
            self._weighted_input = torch.empty(rows.input.shape, dtype=weight.dtype, device=weight.device)
            scale_rows(rows.input, rows.coefficients.elsewhere, self._weighted_input)

    def add(self, slab: Slab) -> None:
        """Add a slab's part. Its exponentials are overwritten if the weighted hidden states were dropped."""
        # The slab has another dtype only in the interpreter, whose casts to bfloat16 do not round rightly.
        slab = Slab(slab.exponentials.to(self._weight.dtype), slab.first_column)
        e, part = slab.exponentials, slice(slab.first_column, slab.first_column + slab.exponentials.shape[1])
        if self._wanted.input:
            self.input_sums = _add_input_products(self.input_sums, e, self._weight[part])
        if self._wanted.bias:
            launch_gradients.bias_gradient(self.bias[part], slab, self._rows)
        if self._wanted.weight and self._grad_weight is not None:
            x = self._weighted_input
            if x is None:
                scale_rows(e, self._rows.coefficients.elsewhere, e)
                x = self._rows.input
            launch_gradients.weight_gradient(self._grad_weight[part], slab, self._rows, x)

    def drop_weighted_input(self) -> None:
        """Free the weighted copy of the hidden states. From now on slabs are weighted instead."""
        self._weighted_input = None


def _add_input_products(sums: Tensor | None, exponentials: Tensor, weight: Tensor) -> Tensor:
    """``sums + exponentials @ weight`` in the accumulator's dtype, (N, H)."""
    for first in range(0, exponentials.shape[1], _ADDED_AT_ONCE):
        part = slice(first, first + _ADDED_AT_ONCE)
        e, w = exponentials[:, part], weight[part]
        if sums is None:
            sums = product(e, w)
        else:
            add_product(sums, e, w)
        note("input_product", e.dtype, rows=e.shape[0], columns=e.shape[1], hidden=w.shape[1])
    assert sums is not None  # no slab is empty
    return sums
