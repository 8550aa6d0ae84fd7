"""The op's laws: equations between runs of the candidate."""

from __future__ import annotations

from collections.abc import Sequence

from ktonum.bounds import PRECISE
from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.declare.op import Law
from ktonum.measure.probe import Probe, equality_probe

__all__ = ["law_check"]


def law_check(law: Law) -> Check:
    """The check that ``law`` holds, named ``law:NAME``."""

    def probes(context: CaseContext) -> list[Probe]:
        runs = law.variants(context.run)
        if runs is None:
            raise Inapplicable(f"the law '{law.name}' does not apply to this case")
        expected = law.combine([context.evaluate(run) for run in runs], context.run).tensors()
        actual = context.result.tensors()
        if law.exact:
            found = [
                equality_probe(name, actual=actual[name], expected=tensor, law=f"law '{law.name}'")
                for name, tensor in expected.items()
                if name in actual
            ]
        else:
            found = held_to_bounds(context, actual=actual, expected=expected, scale=law.scale)
        if not law.promised:
            _tell(law, found)
        return found

    return Check(
        f"law:{law.name.replace(' ', '-')}",
        f"the law '{law.name}' holds between runs of the candidate",
        probes,
        applies=lambda op, case: law.applies(case.point.parameters),
    )


def _tell(law: Law, probes: Sequence[Probe]) -> None:
    """Report that a law does not hold which the op does not promise.

    Raises:
        Inapplicable: The law does not hold. The message names the tensors and says how far off they are.
    """
    broken = [m for p in probes for m in p.measure(p.actual, PRECISE.name) if not m.within]
    if broken:
        words = ", ".join(f"{m.name} = {m.value:.3g}" for m in broken)
        raise Inapplicable(f"the op does not promise the law '{law.name}', and it does not hold: {words}")
