"""Log-probabilities of sequences as a differentiable function, eager or under torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device.formula.launch import FormulaInputs, formula
from ktonum.kernels.device.hardware import check_support
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.step.forward_passes import forward_passes
from ktonum.kernels.step.operators import FURTHER_PASSES, heads_of, refuse_second_derivative, stored_numbers
from ktonum.kernels.step.sequence_gradients import sequence_gradients
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage

__all__ = ["ScoringOptions", "SequenceLogps", "differentiable_formula", "sequence_logps"]

_CONSTANTS = ("ref_input", "ref_weight", "ref_bias", "kl_input", "kl_target", "kl_ref_input")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How sequences are scored.

    Attributes:
        ignore_index: Marks masked tokens: they cost no matrix work.
        average: The sums are to be divided by the numbers of unmasked tokens, so there must be one.
        allow_tf32: Let float32 products run in TF32.
        validate: Check targets and finiteness.
        workspace: Bytes of exponentials that the forward may store for the backward, beside what fits into the memory
            of the weight's gradient; what does not fit is computed again.
    """

    ignore_index: int
    average: bool
    allow_tf32: bool
    validate: bool
    workspace: int


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


def sequence_logps(inputs: KTOInputs, finite: Mapping[str, Tensor], options: ScoringOptions) -> SequenceLogps:
    """Log-probabilities of all sequences; only the policy's carry a gradient.

    Args:
        inputs: Of the right structure.
        finite: Further tensors that ``options.validate`` checks, by name.
        options: See there.

    Raises:
        InputError: The device cannot run the kernels; with ``validate`` also for targets outside the vocabulary,
            inputs that are not finite, and an average over nothing.
    """
    t = inputs
    check_support(t.input.device, t.input.dtype)
    constants = {name: getattr(t, name) for name in _CONSTANTS}
    if t.kl_target is not None:
        constants["kl_target"] = t.kl_target.long()
    target = t.target.long()
    grad = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        store = grad and any(d is not None and d.requires_grad for d in (t.input, t.weight, t.bias))
        found = torch.ops.ktonum.sequence_logps(
            t.input,
            t.weight,
            t.bias,
            target,
            *(None if c is None else c.detach() for c in constants.values()),
            list(finite.values()),
            " ".join(finite),
            options.ignore_index,
            options.average,
            options.allow_tf32,
            options.validate,
            store,
            options.workspace,
        )
        policy, logits, *further = found[:5]
        others = dict(zip(FURTHER_PASSES, further, strict=True))
    else:
        constants["target"] = target
        policy, logits, *further = _Scoring.apply(t.input, t.weight, t.bias, constants, finite, options, grad)  # type: ignore[no-untyped-call]
        names = [
            n
            for n, given in zip(FURTHER_PASSES, (t.ref_input, t.kl_input, t.kl_ref_input), strict=True)
            if given is not None
        ]
        others = dict(zip(names, further, strict=True))
    given = {"reference": t.ref_input, "kl": t.kl_input, "kl_reference": t.kl_ref_input}
    return SequenceLogps(
        policy, logits.detach(), *(others[name].detach() if g is not None else None for name, g in given.items())
    )


class _Scoring(torch.autograd.Function):
    """`forward_passes` of eager tensors: the policy's sums, its sums of logits, and those of the other passes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        constants: Mapping[str, Tensor | None],
        finite: Mapping[str, Tensor],
        options: ScoringOptions,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        tensors = {"input": input, "weight": weight, "bias": bias, **constants}
        heads = heads_of(tensors, options.ignore_index, options.allow_tf32)
        storage, target = Storage(), heads["policy"].target
        if grad and any(ctx.needs_input_grad[:3]):
            stored = stored_numbers(input, weight, target, options.workspace)
            storage = Storage(stored, in_gradient=ctx.needs_input_grad[1] and stored < target.numel() * len(weight))
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
            sums, logits, others = forward_passes(
                heads, finite, average=options.average, validate=options.validate, storage=storage
            )
        # Saved, so that a backward frees them however long the loss lives on.
        packing = sums.packing
        saved = (sums.statistics, packing.rows, packing.targets, packing.starts, sums.exponentials)
        ctx.save_for_backward(input, weight, bias, target, *saved)
        ctx.count, ctx.known, ctx.gradient, ctx.options = packing.count, packing.known, sums.gradient, options
        ctx.set_materialize_grads(False)
        further = tuple(others[name] for name in FURTHER_PASSES if name in others)
        ctx.mark_non_differentiable(logits, *further)
        return (sums.logps, logits, *further)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if upstream is None or not any(needed):
            return (None,) * 7
        input, weight, bias, target, statistics, rows, targets, starts, exponentials = ctx.saved_tensors
        options, packing = ctx.options, Packing(rows, targets, starts, ctx.count, ctx.known)
        # Its memory becomes the weight's gradient: a second backward computes again what lay there.
        sums = SequenceSums(upstream, statistics, packing, exponentials, ctx.gradient)
        ctx.gradient = None
        head = Head(input, weight, bias, target, options.ignore_index, options.allow_tf32)
        with torch.no_grad(), torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
            found = sequence_gradients(head, upstream, sums, wanted=needed, workspace=options.workspace)
        gradients = [g if n else None for g, n in zip(found, needed, strict=True)]
        if torch.is_grad_enabled():
            without = _WithoutDerivative.apply
            gradients = [None if g is None else without(g, upstream, input, weight) for g in gradients]  # type: ignore[no-untyped-call]
        return (*gradients, *(None,) * 4)


class _WithoutDerivative(torch.autograd.Function):
    """A gradient that depends on tensors through which nothing can flow."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse_second_derivative()


def differentiable_formula(inputs: FormulaInputs, config: KTOConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`device.formula.launch.formula`, differentiable by ``inputs.policy``: the loss and the metrics, (6,)."""
    loss, metrics = _Formula.apply(inputs.policy, inputs, config, dtype)  # type: ignore[no-untyped-call]
    return loss, metrics


class _Formula(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, inputs: FormulaInputs, config: KTOConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(policy):  # type: ignore[no-untyped-call]
            loss, slope, metrics = formula(replace(inputs, policy=policy), config, dtype)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return None if upstream is None else slope * upstream, None, None, None
