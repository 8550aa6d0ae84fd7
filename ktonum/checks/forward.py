"""Every output is compared with the float64 oracle."""

from __future__ import annotations

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, held_to_bounds
from ktonum.measure.probe import Probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    outputs = {k: v for k, v in context.expected().items() if k in context.oracle.outputs}
    return held_to_bounds(context, actual=context.result.tensors(), expected=outputs)


CHECK = Check("forward", "every output is within its rounding-error bound of the float64 oracle", _probes)
