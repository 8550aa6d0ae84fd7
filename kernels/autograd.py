"""Log-probabilities of sequences as differentiable custom operators, opaque to torch.compile.

What happens on the device is decided by values (how many tokens are unmasked), so Dynamo must not look inside;
`torch.library` custom operators give that together with autograd and fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.launch import check_support
from ktonum.kernels.sequences import Head, SequenceSums, sequence_gradients, sequence_sums
from ktonum.kernels.validation import refuse_nonfinite

__all__ = ["detached_double", "sequence_logps"]


@torch.library.custom_op("ktonum::sequence_logps", mutates_args=())
def _sequence_logps(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    average: bool,
    logit_sums: bool,
    allow_tf32: bool,
    validate: bool,
    workspace: int,
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ktonum.kernels.sequences.sequence_sums`, flat: the fields of `SequenceSums` in order."""
    head = Head(input, weight, bias, target, ignore_index, allow_tf32)
    sums = sequence_sums(head, average=average, logit_sums=logit_sums, validate=validate, names=names)
    return sums.logps, sums.logits, sums.statistics, sums.rows, sums.count


@_sequence_logps.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    average: bool,
    logit_sums: bool,
    allow_tf32: bool,
    validate: bool,
    workspace: int,
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = target.shape
    wide = input.new_empty(batch, dtype=torch.float64)
    return (
        wide,
        torch.empty_like(wide),
        input.new_empty((2, batch * tokens), dtype=torch.float64),
        target.new_empty(batch * tokens, dtype=torch.int64),
        torch.empty((), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("ktonum::sequence_logps_backward", mutates_args=())
def _sequence_logps_backward(
    upstream: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    rows: Tensor,
    count: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    ignore_index: int,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ktonum.kernels.sequences.sequence_gradients`, flat."""
    head = Head(input, weight, bias, target, ignore_index, allow_tf32)
    # A backward reads neither of the forward's sums.
    sums = SequenceSums(upstream, upstream, statistics, rows, count)
    wanted = (input_gradient, weight_gradient, bias_gradient)
    return sequence_gradients(head, upstream, sums, wanted=wanted, workspace=workspace)


@_sequence_logps_backward.register_fake
def _(
    upstream: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    rows: Tensor,
    count: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    ignore_index: int,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if input_gradient else (0,)),
        weight.new_empty(weight.shape if weight_gradient else (0,)),
        weight.new_empty((weight.shape[0] if bias_gradient else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, target, ignore_index, _, _, allow_tf32, _, workspace, _ = inputs
    _, _, statistics, rows, count = output
    ctx.save_for_backward(input, weight, bias, target, statistics, rows, count)
    ctx.options = (ignore_index, allow_tf32, workspace)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    unused = (None,) * (len(ctx.needs_input_grad) - 3)
    if upstream is None or not any(needed):
        return (None, None, None, *unused)
    input, weight, bias, target, statistics, rows, count = ctx.saved_tensors
    gradients = torch.ops.ktonum.sequence_logps_backward(
        upstream, input, weight, bias, target, statistics, rows, count, *needed, *ctx.options
    )
    return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), *unused)


def _refuse_second_derivative(*_: Any) -> None:
    raise NotImplementedError(
        "the KTO kernels have no second derivative (create_graph=True, or a backward through a gradient): use "
        "ktonum.kernels.ReferenceKTOLoss for it"
    )


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)
_sequence_logps_backward.register_autograd(_refuse_second_derivative)


@torch.library.custom_op("ktonum::finite_double", mutates_args=())
def _finite_double(tensor: Tensor, name: str) -> Tensor:
    refuse_nonfinite(**{name: tensor})
    return tensor.to(torch.float64, copy=True)


@_finite_double.register_fake
def _(tensor: Tensor, name: str) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.float64)


def detached_double(tensor: Tensor | None, *, name: str, validate: bool) -> Tensor | None:
    """``tensor`` in float64 and without gradient; with ``validate`` it must be finite.

    Raises:
        InputError: It is not.
    """
    if tensor is None:
        return None
    detached = tensor.detach()
    return torch.ops.ktonum.finite_double(detached, name) if validate else detached.double()


def sequence_logps(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int,
    average: bool,
    logit_sums: bool,
    allow_tf32: bool,
    validate: bool,
    workspace: int,
    names: str,
) -> tuple[Tensor, Tensor]:
    """Sum of each sequence's unmasked log-probabilities, differentiable, and sum of all its logits, not.

    Args:
        input: Hidden states, (B, T, H), any strides.
        weight: Head, (V, H), any strides.
        bias: (V,) or None.
        target: (B, T), integer.
        ignore_index: Marks masked tokens: they cost no matrix work.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        logit_sums: Compute the sums of logits, else return zeros.
        allow_tf32: Let float32 products run in TF32.
        validate: Check targets and finiteness, at the price of a device synchronisation.
        workspace: Bytes that the backward may use for a slab of probabilities.
        names: What messages call input, weight, bias and target, separated by blanks.

    Returns:
        Two float64 tensors, (B,).

    Raises:
        InputError: The device cannot run the kernels; with ``validate`` also for targets outside the vocabulary,
            inputs that are not finite, and an average over nothing.
    """
    check_support(input.device, input.dtype)
    logps, sums, *_ = torch.ops.ktonum.sequence_logps(
        input, weight, bias, target.long(), ignore_index, average, logit_sums, allow_tf32, validate, workspace, names
    )
    return logps, sums.detach()
