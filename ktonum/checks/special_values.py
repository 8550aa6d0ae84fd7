"""Outputs and gradients for extreme inputs: large magnitudes, peaked distributions, zeros."""

from __future__ import annotations

from functools import partial

from ktonum.case.context import CaseContext
from ktonum.case.variants import varied
from ktonum.checks.check import Check, Inapplicable
from ktonum.declare.special_inputs import default_special_inputs
from ktonum.measure.probe import ENOUGH_TO_AVERAGE, Probe, bounded_probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    declared = context.op.special_inputs
    probes = []
    for words, change in (default_special_inputs(context.differentiable) if declared is None else declared).items():
        inputs = change(context.inputs, context.parameters)
        if inputs is None:
            continue
        case = varied(context, inputs=inputs)
        actual = case.result.tensors()
        probes += [
            # If an input is constant, all elements share one rounding error. An error model says how large it may be. A
            # measured bound may be small by luck, so only the element and norm measures are checked.
            bounded_probe(
                name,
                actual=actual[name],
                expected=tensor,
                bound=partial(case.bound_at_extremes, name),
                enough=None if context.op.error_model is None else ENOUGH_TO_AVERAGE,
                context=f"with {words}",
            )
            for name, tensor in case.expected().items()
        ]
    if not probes:
        raise Inapplicable("the op declares no special inputs for these parameters")
    return probes


CHECK = Check(
    "special_values", "outputs and gradients are within their bounds for large, peaked and zero inputs", _probes
)
