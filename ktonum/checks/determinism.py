"""Two runs on the same inputs agree bit for bit."""

from __future__ import annotations

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check
from ktonum.measure.probe import Probe, equality_probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    first, second = context.result.tensors(), context.evaluate().tensors()
    return [
        equality_probe(name, actual=second[name], expected=tensor, law="a second run is equal bit for bit")
        for name, tensor in first.items()
    ]


CHECK = Check("determinism", "two runs on the same inputs agree bit for bit", _probes)
