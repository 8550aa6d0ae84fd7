"""The signed error over several draws of the inputs: its projection on the oracle, which does not average out.

Errors that make training drift are much smaller than the rounding of each element, but the same in every step. In one
case, a bias must be larger than the noise that is left after averaging over the elements. Several draws of the inputs
average over more elements, so they show a smaller bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ktonum.bounds import PRECISE, ErrorBound
from ktonum.case.context import CaseContext
from ktonum.case.variants import redrawn
from ktonum.checks.check import Check, Inapplicable
from ktonum.measure.probe import Probe, bounded_probe
from ktonum.results import Measurement

__all__ = ["CHECK"]

# The smallest and the largest number of draws; the first draw is the case's own inputs. Between the two, the number is
# just large enough to show a bias of a thousandth in every gradient, because noise falls as the root of the number.
_FEWEST, _MOST = 8, 64
_TOLD_FROM_NOISE = 1e-3


def _probes(context: CaseContext) -> list[Probe]:
    cases = [context, *(redrawn(context, i) for i in range(1, _FEWEST))]
    cases += [redrawn(context, i) for i in range(_FEWEST, _draws_needed(cases))]
    # A tensor that is missing in one draw is left out in all of them.
    found = [case.expected() for case in cases]
    names = [name for name in found[0] if all(name in f for f in found) and any(f[name].any() for f in found)]
    if not names:
        raise Inapplicable("every output and gradient is exactly zero or missing in a draw, so it has no signed error")
    return [_pooled(name, cases, [case.result.tensors()[name] for case in cases]) for name in names]


def _draws_needed(cases: Sequence[CaseContext]) -> int:
    gradients = [f"grad_{name}" for name, g in cases[0].oracle.gradients.items() if g is not None]
    granted = [0.0]
    for name in gradients:
        # The oracle takes the place of the candidate, because only the bound is needed.
        truth = [tensors[name] for case in cases if name in (tensors := case.oracle.tensors())]
        if len(truth) == len(cases):
            probe = _pooled(name, cases, truth)
            granted += [m.bound for m in probe.measure(probe.actual, PRECISE.name)]
    needed = _FEWEST * (max(granted) / _TOLD_FROM_NOISE) ** 2
    return min(_MOST, max(_FEWEST, math.ceil(needed))) if math.isfinite(needed) else _FEWEST


def _pooled(name: str, cases: Sequence[CaseContext], tensors: Sequence[Tensor]) -> Probe:
    """The tensors of all draws, one after the other: their common projection is the pooled bias."""
    actual, expected = _joined(tensors), _joined([case.oracle.tensors()[name] for case in cases])

    def bound(standard: str) -> ErrorBound:
        parts = [case.bounds(standard)[name] for case in cases]
        independent, coherent = _joined([p.independent for p in parts]), _joined([p.coherent for p in parts])
        squares = [_finite_square(case.oracle.tensors()[name]) for case in cases]
        bias = sum(p.bias * square for p, square in zip(parts, squares, strict=True)) / (sum(squares) or 1.0)
        return replace(parts[0], independent=independent, coherent=coherent, bias=bias)

    end_to_end = bounded_probe(name, actual=actual, expected=expected, bound=bound, enough=2)

    def measure(tensor: Tensor, standard: str) -> tuple[Measurement, ...]:
        error = _standard_error(tensor, expected, len(cases))
        return tuple(
            replace(m, measure="bias", draws=len(cases), standard_error=error)
            for m in end_to_end.measure(tensor, standard)
            if m.measure == "signed_bias"
        )

    return Probe(name, actual, measure, end_to_end.expectation)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _finite_square(tensor: Tensor) -> float:
    return float(tensor.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum())


def _standard_error(actual: Tensor, expected: Tensor, draws: int) -> float:
    """The standard error of Σ p_i / Σ n_i, with projections p_i and squared norms n_i of the draws, from residuals."""
    e = expected.double()
    error = actual.double() - e
    usable = error.isfinite()
    error, e = torch.where(usable, error, 0.0), torch.where(usable, e, 0.0)
    products, norms = (error * e).view(draws, -1).sum(1), e.square().view(draws, -1).sum(1)
    if not bool(norms.sum() > 0):
        return 0.0
    residuals = products - products.sum() / norms.sum() * norms
    return math.sqrt(draws / (draws - 1)) * float(residuals.norm() / norms.sum())


CHECK = Check(
    "bias",
    "over several draws of the inputs, the signed error that remains is not larger than roundings explain",
    _probes,
)
