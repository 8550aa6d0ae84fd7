"""The checks, one in each file. `CHECKS` is the registry: a new check is one file here and one line there."""

from __future__ import annotations

from ktonum.checks import (
    autocast,
    bias,
    determinism,
    finite_differences,
    forward,
    gradient_subsets,
    gradients,
    graph,
    growth,
    linearity,
    nonfinite,
    peak_memory,
    special_values,
    strided,
    structure,
    unmodified,
    upstream,
    written,
)
from ktonum.checks.check import Check, Inapplicable
from ktonum.checks.law import law_check
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.errors import UsageError

__all__ = ["CHECKS", "Check", "Inapplicable", "checks_for"]

#: The checks of every op, in the order of the reports.
CHECKS: tuple[Check, ...] = (
    forward.CHECK,
    gradients.CHECK,
    finite_differences.CHECK,
    linearity.CHECK,
    determinism.CHECK,
    unmodified.CHECK,
    written.CHECK,
    strided.CHECK,
    gradient_subsets.CHECK,
    upstream.CHECK,
    graph.CHECK,
    structure.CHECK,
    autocast.CHECK,
    special_values.CHECK,
    nonfinite.CHECK,
    bias.CHECK,
    growth.CHECK,
    peak_memory.CHECK,
)


def checks_for(op: Op, case: Case) -> tuple[Check, ...]:
    """The checks to run on a case: all that apply, or only the ones that its point names.

    Raises:
        UsageError: The point names a check that does not exist.
    """
    known = (*CHECKS, *(law_check(law) for law in op.laws))
    asked = case.point.checks
    unknown = {*asked, *case.point.without} - {c.name for c in known}
    if unknown:
        raise UsageError(f"unknown check {', '.join(sorted(unknown))}: use {', '.join(c.name for c in known)}")
    return tuple(
        c for c in known if c.applies(op, case) and (not asked or c.name in asked) and c.name not in case.point.without
    )
