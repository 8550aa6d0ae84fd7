"""Log-probabilities of sequences and the loss formula as differentiable functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device.formula.launch import FormulaInputs, formula
from ktonum.kernels.device.hardware import check_support
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.step.flattening import Layout
from ktonum.kernels.step.forward_passes import ScoringOptions, SequenceLogps, forward_passes
from ktonum.kernels.step.operators import compiled_logps
from ktonum.kernels.step.sequence_gradients import Wanted, refuse_second_derivative, sequence_gradients
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage, stored_numbers

__all__ = ["differentiable_formula", "sequence_logps"]

_LOGPS = Layout(SequenceLogps)
_DIFFERENTIABLE = ("input", "weight", "bias")


def sequence_logps(inputs: KTOInputs, options: ScoringOptions) -> SequenceLogps:
    """Log-probabilities of all sequences; only the policy's carry a gradient.

    Args:
        inputs: Of the right structure.
        options: See there.

    Raises:
        InputError: The device cannot run the kernels; with ``options.validate`` also for targets outside the
            vocabulary, inputs that are not finite, and an average over nothing.
    """
    check_support(inputs.input.device, inputs.input.dtype)
    changed = {"target": inputs.target.long()}
    if inputs.kl_target is not None:
        changed["kl_target"] = inputs.kl_target.long()
    grad = torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        given = replace(inputs, **changed)
        return _LOGPS.from_flat(_Scoring.apply(given.input, given.weight, given.bias, given, options, grad))  # type: ignore[no-untyped-call]
    constants = {name: tensor for name, tensor in inputs.tensors().items() if name not in _DIFFERENTIABLE}
    given = replace(inputs, **{name: tensor.detach() for name, tensor in (constants | changed).items()})
    store = grad and any(t is not None and t.requires_grad for t in (given.input, given.weight, given.bias))
    return compiled_logps(given, options, store=store)


class _Scoring(torch.autograd.Function):
    """`forward_passes` of eager tensors: the fields of `SequenceLogps`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: KTOInputs,
        options: ScoringOptions,
        grad: bool,
    ) -> tuple[Tensor | None, ...]:
        wanted, storage, target = Wanted(*ctx.needs_input_grad[:3]), Storage(), inputs.target
        if grad and wanted.any:
            stored = stored_numbers(weight, target, options.workspace)
            storage = Storage(stored, in_gradient=wanted.weight and stored < target.numel() * len(weight))
        # Triton launches on the current device, and the tensors may be on another.
        with torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
            logps, sums = forward_passes(inputs, options, storage)
        # Autograd saves these, so that a backward frees them even if the loss lives on.
        packing = sums.packing
        saved = (sums.statistics, packing.rows, packing.targets, packing.starts, sums.exponentials)
        ctx.save_for_backward(input, weight, bias, target, *saved)
        ctx.count, ctx.known, ctx.gradient, ctx.options = packing.count, packing.known, sums.gradient, options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(t for t in (logps.logits, logps.reference, logps.kl, logps.kl_reference) if t is not None)
        )
        return tuple(_LOGPS.to_flat(logps))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = Wanted(*ctx.needs_input_grad[:3])
        if upstream is None or not wanted.any:
            return None, None, None, None, None, None
        input, weight, bias, target, statistics, rows, targets, starts, exponentials = ctx.saved_tensors
        options, packing = ctx.options, Packing(rows, targets, starts, ctx.count, ctx.known)
        # This memory becomes the weight's gradient, so a second backward computes again what lay in it.
        sums = SequenceSums(upstream, statistics, packing, exponentials, ctx.gradient)
        ctx.gradient = None
        head = Head(input, weight, bias, target, options.ignore_index, options.allow_tf32)
        with torch.no_grad(), torch.cuda.device_of(input):  # type: ignore[no-untyped-call]
            found = sequence_gradients(head, upstream, sums, wanted=wanted, workspace=options.workspace)
        gradients = wanted.select(found)
        if torch.is_grad_enabled():
            without = _WithoutDerivative.apply
            gradients = [None if g is None else without(g, upstream, input, weight) for g in gradients]  # type: ignore[no-untyped-call]
        return *gradients, None, None, None


class _WithoutDerivative(torch.autograd.Function):
    """A gradient that depends on ``sources``, although no second derivative can flow to them."""

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
