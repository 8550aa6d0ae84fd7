"""Operands of any layout: strided, expanded, beside tile edges; through tensor descriptors and through pointers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.device import hardware, trace
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss
from support.combinations import combinations
from support.kto_gradients import Work, hold_gradients
from support.kto_inputs import Recipe, draw, kernel_outcome, mapped, oracle_outcome
from support.kto_rounding import objections, spreads

SIXTEEN_BIT = [torch.float16, torch.bfloat16]


def every_other(tensor: Tensor) -> Tensor:
    """The same values at a stride of two in every dimension, NaN in between."""
    if not tensor.is_floating_point():
        filler = torch.full([2 * s for s in tensor.shape], True if tensor.dtype == torch.bool else 10**6)
        wide = filler.to(tensor.dtype).to(tensor.device)
    else:
        wide = tensor.new_full([2 * s for s in tensor.shape], torch.nan)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor.detach())
    return view


def reversed_layout(tensor: Tensor) -> Tensor:
    """The same values with the first dimension innermost: a transposed weight, hidden states by hidden unit."""
    order = list(reversed(range(tensor.dim())))
    return tensor.detach().permute(order).contiguous().permute(order)


def offset(tensor: Tensor) -> Tensor:
    """The same values one element into a storage, where no vector load is aligned."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor.detach())


@combinations(
    "dtype, layout",
    [torch.float32, torch.bfloat16],
    {layout.__name__: layout for layout in (every_other, reversed_layout, offset)},
)
def test_any_strides(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> None:
    recipe = Recipe(dims=(3, 5, 37, 300), dtype=dtype, reference="model", kl="sequences")
    plain = draw(recipe, device)
    strided = mapped(plain, lambda t: layout(t) if t.dim() else t)
    assert strided.input.storage_offset() or not strided.input.is_contiguous()
    expected = kernel_outcome(plain, KTOConfig(), names=())
    # The policy's pass stores, as that of the plain inputs does not; the others score alone.
    actual = hold_gradients(strided, KTOConfig())
    assert not objections(actual.loss, expected.loss, spreads(plain, KTOConfig())["loss"])


def test_expanded_inputs(device: torch.device) -> None:
    """Strides of 0: one sequence for the whole batch, one bias for the whole vocabulary."""
    inputs = draw(Recipe(dims=(3, 5, 19, 41)), device)
    assert inputs.bias is not None
    one, bias = inputs.input[:1].clone().requires_grad_(), inputs.bias[:1].clone().requires_grad_()
    expanded = replace(inputs, input=one.expand(3, -1, -1), bias=bias.expand(41))
    loss, _ = fused_linear_kto_loss(expanded)
    found = torch.autograd.grad(loss, (one, bias))
    config = KTOConfig()
    expected, spread = oracle_outcome(expanded, config), spreads(expanded, config)
    # Autograd sums an expanded tensor's gradient: the spreads of its terms add up in the square.
    for gradient, name in zip(found, ("input", "bias"), strict=True):
        total = expected.gradients[name].sum(0, keepdim=True)
        # The sum rounds as well, once for each of its terms at most.
        size = expected.gradients[name].abs().sum(0, keepdim=True)
        terms = expected.gradients[name].shape[0]
        bound = (spread[name].square().sum(0, keepdim=True) + terms * (2.0**-53 * size) ** 2).sqrt()
        assert not objections(gradient, total, bound), name


def transposed_weight(tensor: Tensor) -> Tensor:
    """The same values, as another matrix of that shape transposed; vectors as they are."""
    return reversed_layout(tensor) if tensor.dim() == 2 else tensor


@dataclass(frozen=True)
class Load:
    """Operands, and whether their tiles come through descriptors: of the logits, and of the weight's gradient."""

    dims: tuple[int, int, int, int]
    masked: float
    layout: Callable[[Tensor], Tensor] | None
    described: tuple[bool, bool]


LOADS = {
    "aligned": Load((2, 9, 136, 304), 0.25, None, (True, True)),
    "odd": Load((2, 9, 17, 129), 0.25, None, (False, False)),
    "rows of 40 bytes": Load((2, 9, 20, 304), 0.25, None, (False, False)),
    # The weight's gradient does not read the weight, and reads packed copies of hidden states.
    "transposed weight": Load((2, 9, 136, 304), 0.25, transposed_weight, (False, True)),
    "every other": Load((2, 9, 136, 304), 0.25, every_other, (False, True)),
    "offset": Load((2, 9, 136, 304), 0.0, offset, (False, True)),
    # As they are where no token is masked: here with a stride between hidden entries.
    "reversed": Load((1, 18, 136, 304), 0.0, reversed_layout, (False, False)),
}


# This order of dtypes has "offset" computed again in float16 by default, where the weight's gradient goes both ways.
@combinations("workspace, load, dtype", {"stored": 2**30, "recomputed": 1}, LOADS, [torch.bfloat16, torch.float16])
def test_descriptors_serve_aligned_operands_and_pointers_all_others(
    workspace: int, load: Load, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = draw(Recipe(dims=load.dims, dtype=dtype, masked=load.masked), device)
    if load.layout is not None:
        inputs = mapped(inputs, lambda t: load.layout(t) if t.is_floating_point() else t)  # type: ignore[misc]
    with trace.recorded() as launches:
        hold_gradients(inputs, KTOConfig(), options=KernelOptions(workspace=workspace))
    work = Work(launches)
    described = load.described
    if not hardware.INTERPRETED and hardware.capability(device)[0] != 9:
        described = (False, False)
    assert {launch.descriptors for launch in work.logits} == {described[0]}
    fused = {described[1]}
    if workspace == 1 and load.layout is offset and described[1] and hardware.slab_dtype(dtype) == dtype:
        # The last slab is multiplied with the hidden states themselves.
        fused = {True, False}
    assert bool(work.count("weight_gradient_kernel")) == (True in fused)
    assert bool(work.count("weight_product")) == (False in fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_operands_take_no_descriptors(dtype: torch.dtype, device: torch.device) -> None:
    with trace.recorded() as launches:
        hold_gradients(draw(Recipe(dims=(2, 9, 136, 304), dtype=dtype), device), KTOConfig())
    assert Work(launches).logits
    assert not any(launch.descriptors for launch in launches)


@combinations(
    "rows, vocabulary, hidden, dtype",
    {"127": (1, 127), "128": (2, 64), "129": (3, 43)},
    [255, 256, 257, 520],
    [64, 72],
    SIXTEEN_BIT,
)
def test_descriptors_beside_tile_edges(
    rows: tuple[int, int], vocabulary: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Descriptors give zeros beyond a tensor's edges, where no mask sees to it."""
    dims = (*rows, hidden, vocabulary)
    inputs = draw(Recipe(dims=dims, dtype=dtype, reference="model", masked=0.0), device)
    with trace.recorded() as launches:
        hold_gradients(inputs, KTOConfig())
    if hardware.INTERPRETED:
        assert all(launch.descriptors for launch in Work(launches).logits)
