"""What a check is. A leaf of `ktonum.checks`: checks do not import one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound, from_measured_error
from ktonum.case.context import MEASURED_SCALE, CaseContext
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.measure.probe import Probe, bounded_probe
from ktonum.results import CheckResult

__all__ = ["Check", "Inapplicable", "bound_or_plain", "held_to_bounds"]


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


def held_to_bounds(
    context: CaseContext,
    *,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scale: float = 1.0,
    where: str = "",
) -> list[Probe]:
    """A probe for each expected tensor, against the case's bounds.

    Args:
        context: The case.
        actual: Tensors under audit by name, gradients as ``grad_NAME``.
        expected: What they should be; names that ``actual`` or the bounds lack are left out.
        scale: Multiplies the bounds; 2 where both sides are runs of the candidate, and each may be off by its own.
        where: Words behind each tensor's name, for checks that hold the same tensor against bounds more than once.
    """

    def bound(name: str, standard: str) -> ErrorBound:
        return context.bounds(standard)[name]

    known = context.oracle.tensors()
    return [
        bounded_probe(
            f"{name} {where}".rstrip(), actual=actual[name], expected=tensor, bound=partial(bound, name), scale=scale
        )
        for name, tensor in expected.items()
        if name in actual and name in known
    ]


def bound_or_plain(context: CaseContext, name: str, standard: str) -> ErrorBound:
    """The case's bound; under `eager` no less than what plain PyTorch makes of the case.

    An analysis to first order says nothing of extremes. A logit of 10,000 is rounded by 20 in bfloat16, and which class
    then has the largest probability is chance; a gradient behind a saturated sigmoid has lost its digits.
    """
    own, plain = context.bounds(standard)[name], context.plain.tensors().get(name)
    if standard != "eager" or context.dtype == torch.float64 or plain is None:
        return own
    expected = context.oracle.tensors()[name]
    if bool((~plain.isfinite() & expected.isfinite()).any()):
        anything = torch.full_like(expected, math.inf)
        return ErrorBound(anything, anything, own.dtype, f"the reference in {context.case.dtype} overflows")
    measured, _ = from_measured_error(actual=plain, expected=expected, scale=MEASURED_SCALE)
    return replace(
        own,
        independent=torch.maximum(own.independent.double(), measured),
        coherent=torch.maximum(own.coherent.double(), measured),
        source=f"{own.source}, or {MEASURED_SCALE:g} × the error of the reference in {context.case.dtype}",
    )
