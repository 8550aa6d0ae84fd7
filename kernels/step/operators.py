"""Scoring and its gradients as `torch.library` custom operators, for torch.compile.

What happens on the device is decided by values (how many tokens are unmasked), so Dynamo must not look inside;
custom operators give that together with autograd and fake tensors. Eager code has no need of them, and they cost the
host time: see `ktonum.kernels.step.autograd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.device.hardware import slab_dtype
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.device.slabs import stored_size
from ktonum.kernels.step.forward_passes import PASSES, forward_passes
from ktonum.kernels.step.sequence_gradients import sequence_gradients
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage

__all__ = ["FURTHER_PASSES", "heads_of", "refuse_second_derivative", "stored_numbers"]

#: The passes beside the policy's, in the order of the operator's outputs.
FURTHER_PASSES = ("reference", "kl", "kl_reference")


def heads_of(tensors: dict[str, Tensor | None], ignore_index: int, allow_tf32: bool) -> dict[str, Head]:
    """What `forward_passes` takes, from tensors by the names of `PASSES`."""
    heads = {}
    for name, (hidden_name, weight_name, bias_name, target_name) in PASSES.items():
        hidden, w, y = tensors[hidden_name], tensors[weight_name], tensors[target_name]
        if hidden is not None and w is not None and y is not None:
            heads[name] = Head(hidden, w, tensors[bias_name], y, ignore_index, allow_tf32)
    return heads


def stored_numbers(input: Tensor, weight: Tensor, target: Tensor, workspace: int) -> int:
    """How many exponentials a forward stores in its workspace.

    By the unmasked tokens there may be, not those there are: a compiled graph must know its outputs' sizes.
    """
    return stored_size(target.numel(), weight.shape[0], slab_dtype(input.dtype).itemsize, workspace)


def refuse_second_derivative(*_: Any) -> None:
    """The backward of the gradients."""
    raise NotImplementedError(
        "the KTO kernels have no second derivative (create_graph=True, or a backward through a gradient): use "
        "ktonum.kernels.ReferenceKTOLoss for it"
    )


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
    finite: list[Tensor],
    finite_names: str,
    ignore_index: int,
    average: bool,
    allow_tf32: bool,
    validate: bool,
    store: bool,
    workspace: int,
) -> list[Tensor]:
    """`forward_passes`, flat: policy, logit sums, `FURTHER_PASSES`, statistics, the packing, stored."""
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
    heads = heads_of(tensors, ignore_index, allow_tf32)
    named = dict(zip(finite_names.split(), finite, strict=True))
    storage = Storage(stored_numbers(input, weight, target, workspace) if store else 0)
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
        sums, logit_sums, others = forward_passes(heads, named, average=average, validate=validate, storage=storage)
    none = sums.logps.new_empty(0)
    packing = sums.packing
    # On the CPU, so that a backward reads it without waiting for the device.
    count = torch.tensor((packing.count, packing.known))
    further = [others.get(name, none.clone()) for name in FURTHER_PASSES]
    # An output may be no view of another.
    order = (packing.rows, packing.targets.clone(), packing.starts.clone())
    return [sums.logps, logit_sums.clone(), *further, sums.statistics, *order, count, sums.exponentials]


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
    finite: list[Tensor],
    finite_names: str,
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
    stored = stored_numbers(input, weight, target, workspace) if store else 0
    return [
        input.new_empty(len(input), dtype=wide),
        input.new_empty(len(input), dtype=wide),
        *(input.new_empty(size, dtype=wide) for size in sizes),
        input.new_empty((4, target.numel()), dtype=wide),
        target.new_empty(target.numel(), dtype=torch.int64),
        target.new_empty(target.numel(), dtype=torch.int64),
        target.new_empty(len(target) + 1, dtype=torch.int64),
        torch.empty(2, dtype=torch.int64, device="cpu"),
        input.new_empty(stored, dtype=slab_dtype(input.dtype)),
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
    targets: Tensor,
    starts: Tensor,
    count: Tensor,
    exponentials: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    ignore_index: int,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ktonum.kernels.step.sequence_gradients.sequence_gradients`, flat."""
    head = Head(input, weight, bias, target, ignore_index, allow_tf32)
    # A backward does not read the forward's sums.
    scored, known = count.tolist()
    sums = SequenceSums(upstream, statistics, Packing(rows, targets, starts, scored, bool(known)), exponentials)
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
    targets: Tensor,
    starts: Tensor,
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
    input, weight, bias, target = inputs[:4]
    ignore_index, _, allow_tf32, _, _, workspace = inputs[-6:]
    # Statistics, rows, targets, starts, count and exponentials.
    ctx.save_for_backward(input, weight, bias, target, *output[-6:])
    ctx.options = (ignore_index, allow_tf32, workspace)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:3]
    # One for each argument of the operator; a list's is a list.
    unused = (*(None,) * 7, [None] * len(ctx.needs_input_grad[10]), *(None,) * 7)
    if upstream[0] is None or not any(needed):
        return (None, None, None, *unused)
    input, weight, bias, target, *saved = ctx.saved_tensors
    gradients = torch.ops.ktonum.sequence_logps_backward(
        upstream[0], input, weight, bias, target, *saved, *needed, *ctx.options
    )
    return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), *unused)


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)
_sequence_logps_backward.register_autograd(refuse_second_derivative)
