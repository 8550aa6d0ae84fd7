"""Every gradient against the float64 oracle, by element, in norm, and in projection on the true gradient."""

from __future__ import annotations

from ktonum.cases import Case
from ktonum.checks.check import Check, Inapplicable
from ktonum.context import CaseContext
from ktonum.op import Op
from ktonum.probe import Probe, bounded_probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    if not any(g is not None for g in context.oracle.gradients.values()):
        raise Inapplicable("the reference has no gradients here")
    actual = context.result.tensors()
    return [
        bounded_probe(name, actual=actual[name], expected=expected, bound=lambda s, n=name: context.bounds(s)[n])  # type: ignore[misc]
        for name, expected in context.expected().items()
        if name not in context.oracle.outputs
    ]


def _applies(op: Op, case: Case) -> bool:
    return True


CHECK = Check("gradients", "every gradient is within its rounding-error bound of the float64 oracle", _probes)
