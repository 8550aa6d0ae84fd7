"""Defects planted in the two ops of `small_ops`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subjects.planted import (
    ALL,
    SIXTEEN_BIT,
    Change,
    Defect,
    DriftingUlp,
    SummedInLowPrecision,
    as_if_contiguous,
    last_row_zero,
    last_tile_missing,
    reading_past_the_end,
    rounded,
    tile_of_poison,
    tile_unwritten,
    times,
    truncated_to_bf16,
    with_gradient,
)
from subjects.small_ops import LOSS_POINT, NORM_POINT, rms_norm_with, softmax_loss_with

Inputs = dict[str, Tensor]


def _through(change: Change) -> Callable[[Inputs], Inputs]:
    """Every floating input read through ``change``."""
    return lambda inputs: {k: change(v) if v.is_floating_point() else v for k, v in inputs.items()}


def _scales_in_place(inputs: Inputs) -> Inputs:
    inputs["x"].detach().mul_(0.5)
    return inputs


def _clips_in_place(inputs: Inputs) -> Inputs:
    inputs["x"].detach().clamp_(-1, 1)
    return inputs


def _clears_target_in_place(inputs: Inputs) -> Inputs:
    given = {k: v.clone() for k, v in inputs.items()}
    inputs["target"].zero_()
    return given


def _detaches_weight(inputs: Inputs) -> Inputs:
    return {k: v.detach() if k == "weight" else v for k, v in inputs.items()}


def _halved_when_alone(inputs: Inputs) -> Inputs:
    """The weight's gradient needs a buffer that is filled only with the input's gradient."""
    alone = not inputs["x"].requires_grad
    return {k: with_gradient(v, times(0.5)) if k == "weight" and alone else v for k, v in inputs.items()}


def _detached_when_alone(inputs: Inputs) -> Inputs:
    return inputs if inputs["x"].requires_grad else _detaches_weight(inputs)


def _requires_gradients(inputs: Inputs) -> Inputs:
    inputs["x"].requires_grad_()
    return inputs


def _doubling(inputs: Inputs) -> Inputs:
    """Each backward scales a saved buffer in place: the next one through the same graph gives twice as much."""
    passes = itertools.count()
    return {k: with_gradient(v, lambda g: g * 2 ** next(passes)) if k == "x" else v for k, v in inputs.items()}


def _overwrites_activations(inputs: Inputs) -> Inputs:
    """Overwrites an activation behind autograd's back, as a kernel does. The caller's own tensors stay as they are."""
    x = inputs["x"]
    read = {k: v.clone() for k, v in inputs.items()}
    if not x.is_leaf:
        x.data.zero_()
    return read


def _other_values_without_graph(tensor: Tensor) -> Tensor:
    return tensor if torch.is_grad_enabled() else tensor * 1.01


def _attached_without_graph(tensor: Tensor) -> Tensor:
    return tensor if torch.is_grad_enabled() else tensor.detach().requires_grad_()


def _halved_under_autocast(tensor: Tensor) -> Tensor:
    return tensor * 0.5 if torch.is_autocast_enabled("cpu") else tensor


def _refuses_autocast(inputs: Inputs) -> Inputs:
    if torch.is_autocast_enabled("cpu"):
        raise ValueError("planted")
    return inputs


def _clipped_to_500(tensor: Tensor) -> Tensor:
    return tensor.clamp(-500, 500)


def _nan_hidden(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor)


def _minus_infinity_spread(tensor: Tensor) -> Tensor:
    """Subtracts minus infinity from itself, as in a block of which everything is masked."""
    return tensor + 0 * tensor.detach().amin()


def _refuses_without_a_name(inputs: Inputs) -> Inputs:
    if not inputs["x"].isfinite().all():
        raise ValueError("planted")
    return inputs


def _added_in_chunks(inputs: Inputs) -> Inputs:
    """The weight's gradient is added up row by row in bfloat16."""
    x, weight = inputs["x"], inputs["weight"]
    # One copy for each row, because `rms_norm_with` multiplies row by row.
    return {"x": x, "weight": SummedInLowPrecision.apply(weight, x.shape[0])}


def _other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype == torch.float32 else torch.float32)


def _attached(tensor: Tensor) -> Tensor:
    return tensor + torch.zeros((), dtype=tensor.dtype, requires_grad=True)


def _halves_upstream_in_place(gradient: Tensor) -> Tensor:
    return gradient.mul_(0.5).clone().mul_(2)


def _wide_upstream_ignored(gradient: Tensor) -> Tensor:
    return torch.ones_like(gradient)


def _upstream_as_if_contiguous(gradient: Tensor) -> Tensor:
    """A kernel that knows two layouts: contiguous, and expanded as in the backward of a sum."""
    return gradient if 0 in gradient.stride() else as_if_contiguous(gradient)


def _first_upstream_for_all(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)[0].expand(gradient.shape)


def _subnormals_flushed(gradient: Tensor) -> Tensor:
    """Subnormal numbers become zero, as on some hardware in float16."""
    return torch.where(gradient.abs() < torch.finfo(torch.float16).tiny, 0, gradient)


def _clipped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-4, 4)


def _over_the_batch(tensor: Tensor) -> Tensor:
    """Each row depends on the last one."""
    return tensor * (1 + 1e-1 * tensor[-1, 0])


def _raises(tensor: Tensor) -> Tensor:
    raise ValueError("planted")


def _on(x: Change) -> Mapping[str, Change]:
    return {"x": x}


def _loss(
    name: str, flagged_by: Sequence[str], dtypes: tuple[str, ...] = ALL, breaks: bool = False, **planted: Any
) -> Defect:
    return Defect(name, softmax_loss_with(**planted), LOSS_POINT, tuple(flagged_by), dtypes, breaks)


def _norm(name: str, flagged_by: Sequence[str], breaks: bool = False, **planted: Any) -> Defect:
    return Defect(name, rms_norm_with(**planted), NORM_POINT, tuple(flagged_by), breaks=breaks)


_BOTH = ("gradients", "gradcheck")

LOSS_DEFECTS = (
    _loss("gradient scaled by 1.01", _BOTH, gradient=_on(times(1.01))),
    _loss("gradient's sign flipped", _BOTH, gradient=_on(times(-1.0))),
    _loss("a row of the gradient zero", _BOTH, gradient=_on(last_row_zero)),
    _loss("a tile of the gradient unwritten", ("written",), gradient=_on(tile_unwritten)),
    _loss("a tile of the gradient unwritten, NaN there before", ("written",), gradient=_on(tile_of_poison)),
    _loss("gradient truncated to bf16", ("gradients",), gradient=_on(truncated_to_bf16)),
    _loss("upstream gradient ignored", ("gradients", "linearity"), upstream=_wide_upstream_ignored),
    _loss("logits rounded to bf16", ("gradients",), ("fp16", "fp32", "fp64"), logits=rounded(torch.bfloat16)),
    _loss("logits half too long", ("forward", "gradients"), logits=times(1.5)),
    _loss("input scaled in place", ("unmodified",), receive=_scales_in_place),
    _loss("input clipped in place", ("unmodified",), receive=_clips_in_place),
    _loss("target cleared in place", ("unmodified",), receive=_clears_target_in_place),
    _loss("upstream gradient scaled in place", ("unmodified",), upstream=_halves_upstream_in_place),
    _loss("upstream gradient scaled in place, expanded", ("upstream",), upstream=_halves_upstream_in_place),
    _loss("upstream gradient made positive", ("upstream",), upstream=torch.abs),
    _loss(
        "upstream gradient rounded to bf16", ("upstream",), ("fp16", "fp32", "fp64"), upstream=rounded(torch.bfloat16)
    ),
    _loss("gradient clipped", ("upstream",), gradient=_on(_clipped)),
    _loss("subnormal gradients flushed", ("upstream",), ("fp16",), gradient=_on(_subnormals_flushed)),
    _loss("loss differs from run to run", ("determinism",), output=DriftingUlp()),
    _loss("strides ignored", ("strided",), receive=_through(as_if_contiguous)),
    _loss("reads past the end", ("strided",), receive=_through(reading_past_the_end)),
    _loss("gradient doubled by a second backward", ("graph",), receive=_doubling),
    _loss("activations overwritten", ("graph",), receive=_overwrites_activations),
    _loss("another loss without a graph", ("graph",), output=_other_values_without_graph),
    _loss("loss of another dtype", ("structure",), output=_other_dtype),
    _loss("loss halved under autocast", ("autocast",), ("fp32",), output=_halved_under_autocast),
    _loss("raises under autocast", ("autocast",), ("fp32",), breaks=True, receive=_refuses_autocast),
    _loss("large logits clipped", ("special_values",), logits=_clipped_to_500),
    _loss("NaN hidden", ("nonfinite",), logits=_nan_hidden),
    _loss("minus infinity spread", ("nonfinite",), logits=_minus_infinity_spread),
    _loss("NaN refused without a name", ("nonfinite",), breaks=True, receive=_refuses_without_a_name),
    _loss("gradient a little short, in 16 bits", ("bias",), SIXTEEN_BIT, gradient=_on(times(1 - 2e-3))),
    _loss("raises", ("forward", "gradients", "gradcheck"), breaks=True, logits=_raises),
)

NORM_DEFECTS = (
    _norm("gradient halved", _BOTH, gradient=_on(times(0.5))),
    _norm("last tile of grad_weight missing", _BOTH, gradient={"weight": last_tile_missing}),
    _norm("a tile of the output unwritten", ("written",), output=tile_unwritten),
    _norm("output truncated to bf16", ("forward",), stored=truncated_to_bf16),
    _norm("gradients truncated to bf16", ("gradients",), gradient=_on(truncated_to_bf16)),
    _norm("weight gradient missing", ("gradients",), breaks=True, receive=_detaches_weight),
    _norm("weight gradient missing, by differences", ("gradcheck",), receive=_detaches_weight),
    _norm("weight gradient wrong without the input's", ("gradient_subsets",), receive=_halved_when_alone),
    _norm(
        "weight gradient missing without the input's", ("gradient_subsets",), breaks=True, receive=_detached_when_alone
    ),
    _norm("makes its input require a gradient", ("gradient_subsets",), breaks=True, receive=_requires_gradients),
    _norm("output attached to something else", ("gradient_subsets",), breaks=True, output=_attached),
    _norm("upstream gradient ignored", (*_BOTH, "linearity"), upstream=_wide_upstream_ignored),
    _norm("upstream gradient scaled in place", ("unmodified",), upstream=_halves_upstream_in_place),
    _norm("large inputs clipped", ("special_values",), receive=_through(_clipped_to_500)),
    _norm("NaN hidden", ("nonfinite",), receive=_through(_nan_hidden)),
    _norm("weight gradient added up in bf16", ("growth",), receive=_added_in_chunks),
    _norm("gradient a little short", ("bias",), gradient=_on(times(1 - 1e-3))),
    _norm("gradient doubled by a second backward", ("graph",), receive=_doubling),
    _norm("activations overwritten", ("graph",), receive=_overwrites_activations),
    _norm("a graph under no_grad", ("graph",), breaks=True, output=_attached_without_graph),
    _norm("output of another dtype", ("structure",), output=_other_dtype),
    _norm("upstream gradient's strides ignored", ("upstream",), upstream=_upstream_as_if_contiguous),
    _norm("one upstream gradient for all", ("gradients", "upstream"), upstream=_first_upstream_for_all),
    _norm("rows depend on the batch", ("forward", "law:permutation"), normed=_over_the_batch),
    _norm("rows normalised in bf16", ("forward",), normed=rounded(torch.bfloat16)),
    _norm("output differs from run to run", ("determinism",), output=DriftingUlp()),
    _norm("strides ignored", ("strided",), receive=_through(as_if_contiguous)),
    _norm("reads past the end", ("strided",), receive=_through(reading_past_the_end)),
)
