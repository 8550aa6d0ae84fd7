"""Log-probabilities of sequences as differentiable custom operators, opaque to torch.compile.

What happens on the device is decided by values (how many tokens are unmasked), so Dynamo must not look inside;
`torch.library` custom operators give that together with autograd and fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.hardware import check_support, slab_dtype
from ktonum.kernels.packing import Packing
from ktonum.kernels.passes import PASSES, forward_passes
from ktonum.kernels.sequence_gradients import sequence_gradients
from ktonum.kernels.sequences import Head, SequenceSums
from ktonum.kernels.slabs import stored_size
from ktonum.kernels.validation import KTOInputs, refuse_nonfinite

__all__ = ["SequenceLogps", "detached_double", "sequence_logps"]


@torch.library.custom_op("ktonum::sequence_logps", mutates_args=())
def _sequence_logps(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_input: Tensor | None,
    kl_target: Tensor | None,
    kl_ref_input: Tensor | None,
    ignore_index: int,
    average: bool,
    allow_tf32: bool,
    validate: bool,
    store: bool,
    workspace: int,
) -> list[Tensor]:
    """`ktonum.kernels.passes.forward_passes`, flat: policy, logit sums, `_FURTHER`, statistics, rows, count, stored."""
    tensors = {
        "input": input,
        "weight": weight,
        "bias": bias,
        "target": target,
        "ref_input": ref_input,
        "ref_weight": ref_weight,
        "ref_bias": ref_bias,
        "kl_input": kl_input,
        "kl_target": kl_target,
        "kl_ref_input": kl_ref_input,
    }
    heads = {}
    for name, (hidden_name, weight_name, bias_name, target_name) in PASSES.items():
        hidden, w, y = tensors[hidden_name], tensors[weight_name], tensors[target_name]
        if hidden is not None and w is not None and y is not None:
            heads[name] = Head(hidden, w, tensors[bias_name], y, ignore_index, allow_tf32)
    size = _stored_size(input, weight, target, store, workspace)
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
        sums, logit_sums, others = forward_passes(heads, average=average, validate=validate, store=size)
    none = sums.logps.new_empty(0)
    # The count is a CPU scalar, so that a backward reads it without waiting for the device.
    count = torch.tensor(sums.packing.count)
    further = [others.get(name, none.clone()) for name in _FURTHER]
    return [sums.logps, logit_sums, *further, sums.statistics, sums.packing.rows, count, sums.exponentials]


#: The passes beside the policy's, in the order of the operator's outputs.
_FURTHER = ("reference", "kl", "kl_reference")


def _stored_size(input: Tensor, weight: Tensor, target: Tensor, store: bool, workspace: int) -> int:
    # By the unmasked tokens there may be, not those there are: a compiled graph must know its outputs' sizes.
    itemsize = slab_dtype(input.dtype).itemsize
    return stored_size(target.numel(), weight.shape[0], itemsize, workspace) if store else 0


@_sequence_logps.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_input: Tensor | None,
    kl_target: Tensor | None,
    kl_ref_input: Tensor | None,
    ignore_index: int,
    average: bool,
    allow_tf32: bool,
    validate: bool,
    store: bool,
    workspace: int,
) -> list[Tensor]:
    wide = torch.float64
    sizes = (
        0 if ref_input is None else len(ref_input),
        0 if kl_input is None else len(kl_input),
        0 if kl_ref_input is None else len(kl_ref_input),
    )
    return [
        input.new_empty(len(input), dtype=wide),
        input.new_empty(len(input), dtype=wide),
        *(input.new_empty(size, dtype=wide) for size in sizes),
        input.new_empty((3, target.numel()), dtype=wide),
        target.new_empty(target.numel(), dtype=torch.int64),
        torch.empty((), dtype=torch.int64, device="cpu"),
        input.new_empty(_stored_size(input, weight, target, store, workspace), dtype=slab_dtype(input.dtype)),
    ]


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
    exponentials: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    ignore_index: int,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ktonum.kernels.sequence_gradients.sequence_gradients`, flat."""
    head = Head(input, weight, bias, target, ignore_index, allow_tf32)
    # A backward does not read the forward's sums.
    sums = SequenceSums(upstream, statistics, Packing(rows, int(count)), exponentials)
    wanted = (input_gradient, weight_gradient, bias_gradient)
    with torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
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
    exponentials: Tensor,
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, weight, bias, target, *_, ignore_index, _, allow_tf32, _, _, workspace = inputs
    statistics, rows, count, exponentials = output[-4:]
    ctx.save_for_backward(input, weight, bias, target, statistics, rows, count, exponentials)
    ctx.options = (ignore_index, allow_tf32, workspace)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    unused = (None,) * (len(ctx.needs_input_grad) - 3)
    if upstream[0] is None or not any(needed):
        return (None, None, None, *unused)
    input, weight, bias, target, *saved = ctx.saved_tensors
    gradients = torch.ops.ktonum.sequence_logps_backward(
        upstream[0], input, weight, bias, target, *saved, *needed, *ctx.options
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


@dataclass(frozen=True)
class SequenceLogps:
    """Sums of the sequences' unmasked log-probabilities, float64.

    Attributes:
        policy: (B,), differentiable.
        logits: Sums of all logits of the policy, (B,).
        reference: (B,), or None without a reference model.
        kl: Of the KL sequences under the policy, (B',), or None without any.
        kl_reference: Under the reference model, (B',), or None.
    """

    policy: Tensor
    logits: Tensor
    reference: Tensor | None
    kl: Tensor | None
    kl_reference: Tensor | None


def sequence_logps(
    inputs: KTOInputs, *, ignore_index: int, average: bool, allow_tf32: bool, validate: bool, workspace: int
) -> SequenceLogps:
    """Log-probabilities of all sequences; only the policy's carry a gradient.

    Args:
        inputs: Of the right structure.
        ignore_index: Marks masked tokens: they cost no matrix work.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        allow_tf32: Let float32 products run in TF32.
        validate: Check targets and finiteness.
        workspace: Bytes of exponentials that the forward may store for the backward; what does not fit is computed
            again.

    Raises:
        InputError: The device cannot run the kernels; with ``validate`` also for targets outside the vocabulary,
            inputs that are not finite, and an average over nothing.
    """
    t = inputs
    check_support(t.input.device, t.input.dtype)
    differentiable = (t.input, t.weight) if t.bias is None else (t.input, t.weight, t.bias)
    store = torch.is_grad_enabled() and any(d.requires_grad for d in differentiable)
    constants = {
        name: None if (tensor := getattr(t, name)) is None else tensor.detach()
        for name in ("ref_input", "ref_weight", "ref_bias", "kl_input", "kl_target", "kl_ref_input")
    }
    if t.kl_target is not None:
        constants["kl_target"] = t.kl_target.long()
    options = (ignore_index, average, allow_tf32, validate, store, workspace)
    found = torch.ops.ktonum.sequence_logps(t.input, t.weight, t.bias, t.target.long(), *constants.values(), *options)
    policy, logits, *further = found[:5]
    given = (t.ref_input, t.kl_input, t.kl_ref_input)
    return SequenceLogps(
        policy, logits.detach(), *(None if g is None else f.detach() for g, f in zip(given, further, strict=True))
    )
