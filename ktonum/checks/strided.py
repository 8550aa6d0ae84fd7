"""Inputs with other strides give the same results: in memory, NaN lies between their elements."""

from __future__ import annotations

from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.declare.evaluation import Run
from ktonum.declare.tensor_copies import spaced_out
from ktonum.measure.probe import Probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    inputs = {k: spaced_out(v) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in context.inputs.items()}
    if all(inputs[k] is v for k, v in context.inputs.items()):
        raise Inapplicable("no input is a tensor with dimensions, so there are no strides to change")
    actual = context.evaluate(Run(inputs, context.parameters, context.upstream)).tensors()
    return held_to_bounds(context, actual=actual, expected=context.result.tensors(), scale=2.0)


CHECK = Check("strided", "inputs with gaps between their elements give the same results as contiguous ones", _probes)
