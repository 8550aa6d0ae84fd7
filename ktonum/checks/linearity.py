"""Gradients are linear in the upstream gradient, and zero where it is zero."""

from __future__ import annotations

import torch

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.declare.evaluation import Run
from ktonum.measure.probe import Probe, equality_probe

__all__ = ["CHECK"]

# Not a power of two: scaling by one is exact, so a backward that rounds the upstream gradient would pass.
_FACTOR = -0.75


def _probes(context: CaseContext) -> list[Probe]:
    if not context.upstream:
        raise Inapplicable("the reference has no differentiable outputs")
    upstream = {k: (_FACTOR * v.double()).to(v.dtype) for k, v in context.upstream.items()}
    scaled = context.evaluate(Run(context.inputs, context.parameters, upstream))
    zeros = {k: torch.zeros_like(v) for k, v in context.upstream.items()}
    nothing = context.evaluate(Run(context.inputs, context.parameters, zeros))
    named = {f"grad_{k}": v for k, v in context.result.gradients.items() if v is not None}
    probes = held_to_bounds(
        context,
        actual=scaled.tensors(),
        expected={k: _FACTOR * v.double() for k, v in named.items()},
        # Both runs have errors, and |factor| < 1.
        scale=2.0,
    )
    vanished = nothing.tensors()
    return probes + [
        equality_probe(
            name,
            actual=vanished[name],
            expected=torch.zeros_like(vanished[name]),
            law="a zero upstream gradient gives zero gradients",
            context="at zero upstream",
        )
        for name in named
        if name in vanished
    ]


CHECK = Check("linearity", "gradients scale with the upstream gradient, and are zero if it is zero", _probes)
