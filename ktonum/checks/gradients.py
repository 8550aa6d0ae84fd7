"""Every gradient is compared with the float64 oracle: by element, in norm, and in projection on the right gradient."""

from __future__ import annotations

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.measure.probe import Probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    if not any(g is not None for g in context.oracle.gradients.values()):
        raise Inapplicable("the reference has no gradients for this case")
    gradients = {k: v for k, v in context.expected().items() if k not in context.oracle.outputs}
    return held_to_bounds(context, actual=context.result.tensors(), expected=gradients)


CHECK = Check("gradients", "every gradient is within its rounding-error bound of the float64 oracle", _probes)
