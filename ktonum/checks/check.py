"""What a check is. A leaf of `ktonum.checks`: checks do not import one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktonum.cases import Case
from ktonum.context import CaseContext
from ktonum.op import Op
from ktonum.probe import Probe
from ktonum.results import CheckResult

__all__ = ["Check", "Inapplicable"]


class Inapplicable(Exception):
    """The check cannot tell anything about this case; the message says why. The verdict is INCONCLUSIVE."""


@dataclass(frozen=True)
class Check:
    """One question put to a case.

    Attributes:
        name: Short and unique, e.g. ``gradients``.
        question: What a PASS affirms, in a sentence.
        probes: Takes the measurements; may raise `Inapplicable` or `ktonum.errors.CandidateError`.
        judge: Instead of ``probes``, for checks whose verdict is not a bound: returns the result itself.
        applies: Whether to ask the question at all for an op and case.
    """

    name: str
    question: str
    probes: Callable[[CaseContext], Sequence[Probe]] | None = None
    judge: Callable[[CaseContext], CheckResult] | None = None
    applies: Callable[[Op, Case], bool] = lambda op, case: True
