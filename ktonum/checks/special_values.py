"""Outputs and gradients at the ends of the inputs' range: large magnitudes, peaked distributions, zeros."""

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
            # Where an input is constant all elements share one rounding. An analysis knows how large it may be; a
            # measured reference's is small by chance, so that there element and norm alone are asked.
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
