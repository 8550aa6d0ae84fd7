"""The op's laws: equations between runs of the candidate."""

from __future__ import annotations

from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.context import CaseContext
from ktonum.op import Law
from ktonum.probe import Probe, equality_probe

__all__ = ["law_check"]


def law_check(law: Law) -> Check:
    """The check that ``law`` holds, named ``law:NAME``."""

    def probes(context: CaseContext) -> list[Probe]:
        runs = law.variants(context.run)
        if runs is None:
            raise Inapplicable(f"the law '{law.name}' says nothing about this case")
        expected = law.combine([context.evaluate(run) for run in runs], context.run).tensors()
        actual = context.result.tensors()
        if not law.exact:
            return held_to_bounds(context, actual=actual, expected=expected, scale=law.scale)
        return [
            equality_probe(name, actual=actual[name], expected=tensor, law=f"law '{law.name}'")
            for name, tensor in expected.items()
            if name in actual
        ]

    return Check(f"law:{law.name.replace(' ', '-')}", f"the law '{law.name}' holds between runs", probes)
