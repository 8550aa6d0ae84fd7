"""Outputs and gradients at the ends of the inputs' range: large magnitudes, peaked distributions, zeros."""

from __future__ import annotations

import math
from functools import partial

import torch

from ktonum.bounds import ErrorBound, from_measured_error
from ktonum.checks.check import Check, Inapplicable
from ktonum.context import MEASURED_SCALE, CaseContext
from ktonum.probe import Probe, bounded_probe
from ktonum.special_inputs import default_special_inputs

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    declared = context.op.special_inputs
    probes = []
    for words, change in (default_special_inputs(context.differentiable) if declared is None else declared).items():
        inputs = change(context.inputs, context.parameters)
        if inputs is None:
            continue
        case = context.varied(inputs=inputs)
        actual = case.result.tensors()
        probes += [
            bounded_probe(
                f"{name} with {words}", actual=actual[name], expected=tensor, bound=partial(_bound, case, name)
            )
            for name, tensor in case.expected().items()
        ]
    if not probes:
        raise Inapplicable("the op declares no special inputs for these parameters")
    return probes


def _bound(case: CaseContext, name: str, standard: str) -> ErrorBound:
    """The case's bound; under `eager` in 16 bits also whatever plain PyTorch makes of it.

    A logit of 10,000 is rounded by 20 in bfloat16. Which class then has the largest probability is chance, and an
    analysis to first order says nothing of it.
    """
    own = case.bounds(standard)[name]
    plain = case.plain.tensors().get(name)
    if standard != "eager" or case.dtype not in (torch.bfloat16, torch.float16) or plain is None:
        return own
    expected = case.oracle.tensors()[name]
    if bool((~plain.isfinite() & expected.isfinite()).any()):
        anything = torch.full_like(expected, math.inf)
        return ErrorBound(anything, anything, own.dtype, f"the reference in {case.case.dtype} overflows")
    measured, _ = from_measured_error(actual=plain, expected=expected, scale=MEASURED_SCALE)
    return ErrorBound(
        torch.maximum(own.independent.double(), measured),
        torch.maximum(own.coherent.double(), measured),
        own.dtype,
        f"{own.source}, or {MEASURED_SCALE:g} × the error of the reference in {case.case.dtype}",
    )


CHECK = Check(
    "special_values", "outputs and gradients are within their bounds for large, peaked and zero inputs", _probes
)
