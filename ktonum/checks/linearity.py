"""Gradients are linear in the upstream gradient, and zero where it is zero."""

from __future__ import annotations

import torch

from ktonum.checks.check import Check, Inapplicable
from ktonum.context import CaseContext
from ktonum.evaluation import Run
from ktonum.probe import Probe, bounded_probe, equality_probe

__all__ = ["CHECK"]

# No power of two: scaling by one is exact and would pass a backward that rounds the upstream gradient.
_FACTOR = -0.75


def _probes(context: CaseContext) -> list[Probe]:
    if not context.upstream:
        raise Inapplicable("the reference has no differentiable outputs")
    upstream = {k: (_FACTOR * v.double()).to(v.dtype) for k, v in context.upstream.items()}
    scaled = context.evaluate(Run(context.inputs, context.parameters, upstream))
    zeros = {k: torch.zeros_like(v) for k, v in context.upstream.items()}
    nothing = context.evaluate(Run(context.inputs, context.parameters, zeros))
    probes = []
    for name, gradient in context.result.gradients.items():
        mine, none = scaled.gradients[name], nothing.gradients[name]
        if gradient is None or mine is None:
            continue
        label = f"grad_{name}"
        probes.append(
            bounded_probe(
                label,
                actual=mine,
                expected=_FACTOR * gradient.double(),
                bound=lambda s, n=label: context.bounds(s)[n],  # type: ignore[misc]
                # Both runs err, the upstream gradient may be rounded once more, and |factor| < 1.
                scale=2.0,
            )
        )
        if none is not None:
            probes.append(
                equality_probe(
                    f"{label} at zero upstream",
                    actual=none,
                    expected=torch.zeros_like(none),
                    law="a zero upstream gradient gives zero gradients",
                )
            )
    return probes


CHECK = Check("linearity", "gradients scale with the upstream gradient and vanish with it", _probes)
