"""The type of a check. It imports no other file of `ktonum.checks`, and checks do not import each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ktonum.bounds import ErrorBound
from ktonum.case.context import CaseContext
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.measure.probe import Probe, bounded_probe
from ktonum.results import CheckResult

__all__ = ["Check", "Inapplicable", "held_to_bounds"]


class Inapplicable(Exception):
    """The check cannot tell anything about this case; the message says why. The verdict is INCONCLUSIVE."""


@dataclass(frozen=True)
class Check:
    """One question about a case.

    Attributes:
        name: Short and unique, e.g. ``gradients``.
        question: The statement that a PASS confirms, in a sentence.
        probes: Takes the measurements; may raise `Inapplicable` or `ktonum.errors.CandidateError`.
        judge: Instead of ``probes``, for checks that decide without probes: returns the result itself.
        applies: Whether to ask the question at all for an op and case.
    """

    name: str
    question: str
    probes: Callable[[CaseContext], Sequence[Probe]] | None = None
    judge: Callable[[CaseContext], CheckResult] | None = None
    applies: Callable[[Op, Case], bool] = lambda op, case: True


def held_to_bounds(
    context: CaseContext,
    *,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scale: float = 1.0,
    where: str = "",
) -> list[Probe]:
    """A probe for each expected tensor, which compares it with the case's bounds.

    Args:
        context: The case.
        actual: Tensors under audit by name, gradients as ``grad_NAME``.
        expected: The right values by name; names that ``actual`` or the oracle lacks are left out.
        scale: Multiplies the bounds; 2 if both sides are runs of the candidate, because each may be off by its bound.
        where: The context of each tensor, for checks that measure the same tensor more than once.
    """

    def bound(name: str, standard: str) -> ErrorBound:
        return context.bounds(standard)[name]

    known = context.oracle.tensors()
    return [
        bounded_probe(
            name, actual=actual[name], expected=tensor, bound=partial(bound, name), scale=scale, context=where
        )
        for name, tensor in expected.items()
        if name in actual and name in known
    ]
