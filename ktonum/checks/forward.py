"""Every output against the float64 oracle."""

from __future__ import annotations

from ktonum.checks.check import Check
from ktonum.context import CaseContext
from ktonum.probe import Probe, bounded_probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    actual = context.result.tensors()
    return [
        bounded_probe(name, actual=actual[name], expected=expected, bound=lambda s, n=name: context.bounds(s)[n])  # type: ignore[misc]
        for name, expected in context.expected().items()
        if name in context.oracle.outputs
    ]


CHECK = Check("forward", "every output is within its rounding-error bound of the float64 oracle", _probes)
