"""The op as a node of a larger graph: differentiated twice, its inputs and outputs used elsewhere, or without a graph.

A backward that scales a saved buffer in place is right only the first time. A kernel that writes its result over its
input is right as long as no other node reads that input.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound
from ktonum.bounds.formats import spacing
from ktonum.case.candidate_errors import candidate_errors
from ktonum.case.context import CaseContext
from ktonum.case.lending import lent
from ktonum.checks.check import Check, held_to_bounds
from ktonum.declare.evaluation import named_outputs, tensors_like
from ktonum.errors import CandidateError
from ktonum.measure.probe import Probe, bounded_probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    probes = _without_graph(context)
    if context.upstream:
        probes += _backward_again(context) + _used_elsewhere(context)
    return probes


def _without_graph(context: CaseContext) -> list[Probe]:
    """Under ``no_grad`` the values are the same, and no output requires a gradient."""
    leaves = tensors_like(lent(context.inputs, owner=context.run), context.differentiable)
    with candidate_errors(), torch.no_grad():
        outputs = named_outputs(context.candidate(**leaves))
    present = {k: v for k, v in outputs.items() if v is not None}
    attached = [k for k, v in present.items() if v.requires_grad]
    if attached:
        raise CandidateError(f"returned {', '.join(attached)} with requires_grad under torch.no_grad()")
    expected = {k: v for k, v in context.result.outputs.items() if v is not None}
    missing = sorted(set(expected) - set(present))
    if missing:
        raise CandidateError(f"did not return {', '.join(missing)} under torch.no_grad()")
    return held_to_bounds(context, actual=present, expected=expected, scale=2.0, where="without a graph")


def _backward_again(context: CaseContext) -> list[Probe]:
    """A second backward through the same graph, with outputs that are used twice, gives a single run's gradients."""
    names = _with_gradients(context)
    leaves = tensors_like(lent(context.inputs, owner=context.run), context.differentiable)
    with candidate_errors():
        outputs = _differentiable_outputs(context, leaves)
        # Upstream gradients are multiples of 1/8, so three quarters and one quarter of them add up exactly.
        roots = [part * v for v in outputs.values() for part in (0.75, 0.25)]
        sent = lent(context.upstream, owner=context.run)
        upstream = [sent[k].to(v.dtype) for k, v in outputs.items() for _ in range(2)]
        for again in (True, False):
            gradients = torch.autograd.grad(
                roots, [leaves[n] for n in names], grad_outputs=upstream, retain_graph=again, allow_unused=True
            )
    actual = {f"grad_{n}": g for n, g in zip(names, gradients, strict=True) if g is not None}
    expected = {f"grad_{n}": context.result.gradients[n] for n in names}
    return held_to_bounds(
        context,
        actual=actual,
        expected={k: v for k, v in expected.items() if v is not None},
        scale=2.0,
        where="of a second backward",
    )


def _used_elsewhere(context: CaseContext) -> list[Probe]:
    """Other nodes read the inputs before and after the op. The gradient of an input is the sum over its nodes."""
    names = _with_gradients(context)
    leaves = tensors_like(lent(context.inputs, owner=context.run), names)
    # Not leaves: a kernel that overwrites its input gets activations, which users do not look at afterwards.
    shared = {n: leaves[n].clone() for n in names}
    factors = {n: _factor(context, n) for n in names}
    with candidate_errors():
        squares = {n: shared[n].square() for n in names}
        outputs = _differentiable_outputs(context, {**leaves, **shared})
        roots = [*squares.values(), *(shared[n].square() for n in names), *outputs.values()]
        # A square's derivative times half the factor is the factor times the input, exactly: it is a power of two.
        upstream = [torch.full_like(shared[n], factors[n] / 2) for _ in range(2) for n in names]
        sent = lent(context.upstream, owner=context.run)
        upstream += [sent[k].to(v.dtype) for k, v in outputs.items()]
        gradients = torch.autograd.grad(roots, [leaves[n] for n in names], grad_outputs=upstream, allow_unused=True)
    probes = []
    for name, gradient in zip(names, gradients, strict=True):
        exact = context.oracle.gradients[name]
        if gradient is None or exact is None:
            continue
        others = 2 * (factors[name] * context.inputs[name]).double()
        probes.append(
            bounded_probe(
                f"grad_{name}",
                actual=gradient,
                expected=exact + others,
                bound=partial(_bound_of_sum, context, f"grad_{name}", others),
                context="used elsewhere",
            )
        )
    return probes


def _bound_of_sum(context: CaseContext, name: str, others: Tensor, standard: str) -> ErrorBound:
    """The op's own bound, the rounding of its gradient to the input's dtype, and the rounding of the first sum."""
    own = context.bounds(standard)[name]
    largest = context.oracle.tensors()[name].abs() + others.abs()
    rounding = spacing(largest, own.dtype).view(largest.shape) / 2
    # The bias is relative to the op's own gradient. Here it counts by the share of that gradient in the sum.
    exact, total = context.oracle.tensors()[name].double(), context.oracle.tensors()[name] + others
    squares = float(total.double().square().sum())
    share = float((exact * total).sum()) / squares if squares > 0 else 0.0
    independent = (own.independent.double().square() + 2 * rounding.square()).sqrt()
    return replace(own, independent=independent, bias=own.bias * share)


def _factor(context: CaseContext, name: str) -> float:
    """A power of two that makes the input about as large as its gradient, so that no rounding hides the smaller one."""
    input, gradient = context.inputs[name].double(), context.oracle.gradients[name]
    assert gradient is not None  # see `_with_gradients`
    ratio = float(gradient.norm()) / (float(input.norm()) or 1.0)
    if not math.isfinite(ratio) or ratio == 0.0:
        return 1.0
    # Half of the factor must be a normal number, too.
    return max(2.0 ** round(math.log2(ratio)), 2 * torch.finfo(context.inputs[name].dtype).tiny)


def _with_gradients(context: CaseContext) -> list[str]:
    return [n for n in context.differentiable if context.oracle.gradients[n] is not None]


def _differentiable_outputs(context: CaseContext, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = named_outputs(context.candidate(**inputs))
    return {k: v for k in context.upstream if (v := outputs[k]) is not None}


CHECK = Check(
    "graph", "results stay the same in a second backward, with other uses of the inputs, and under no_grad", _probes
)
