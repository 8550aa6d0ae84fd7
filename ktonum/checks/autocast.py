"""Under autocast the candidate is not worse than plain PyTorch under the same autocast.

Each tensor is compared with plain PyTorch's error on the case itself. The errors of both are also compared over several
draws of the inputs, because one error of one number, such as a loss, says little. For example, a candidate that adds up
log-probabilities in bfloat16 is 25 times as wrong as plain PyTorch, but only one case in thirty shows it by its own
errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import FALSE_ALARM, MEASURED_SCALE, ErrorBound, from_measured_error
from ktonum.case.candidate_errors import candidate_errors
from ktonum.case.context import CaseContext
from ktonum.case.lending import lent
from ktonum.case.variants import further_runs
from ktonum.checks.check import Check, Inapplicable
from ktonum.declare.cases import Case, dtype_name
from ktonum.declare.evaluation import evaluate
from ktonum.declare.op import Op
from ktonum.errors import CandidateError
from ktonum.measure.over_draws import DrawnError, drawn_errors, root_mean_square, typical_errors
from ktonum.measure.probe import Probe, bounded_probe
from ktonum.results import BoundKind, BoundSource, Measurement

__all__ = ["CHECK"]

_DTYPE = torch.bfloat16
# Further draws of the inputs. Plain PyTorch is fast, but the candidate's kernels may run in an interpreter.
_PLAIN_DRAWS, _CANDIDATE_DRAWS = 32, 4
# A root mean square over draws needs less slack than the largest element of one draw. Twice plain PyTorch's error is
# also allowed in FlashAttention's tests (Dao-AILab/flash-attention, test_flash_attn.py). Right candidates used 0.26 of
# the bound.
_GRANTED_OVER_DRAWS = 2.0


def _under_autocast(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Only the forward runs under autocast, as PyTorch's documentation asks."""

    def run(**inputs: Any) -> Any:
        with torch.autocast(device, _DTYPE):
            return function(**inputs)

    return run


def _probes(context: CaseContext) -> list[Probe]:
    names, device = context.differentiable, context.case.device
    plain = _under_autocast(context.reference, device)
    reference = evaluate(plain, context.inputs, differentiable=names, upstream=context.upstream).tensors()
    with candidate_errors():
        result = evaluate(
            _under_autocast(context.candidate, device),
            lent(context.inputs, owner=context.run),
            differentiable=names,
            upstream=lent(context.upstream, owner=context.run),
        )
    for name, gradient in context.result.gradients.items():
        if gradient is not None and result.gradients.get(name) is None:
            raise CandidateError(
                f"gave no gradient for {name!r} under autocast, although it gives one without autocast"
            )
    plain_errors, errors_elsewhere = _errors_elsewhere(context, plain)
    typical = typical_errors(plain_errors, here=context.oracle.tensors(), cancelling=context.op.cancelling)
    actual = result.tensors()
    probes = []
    for name, expected in context.expected().items():
        if name not in actual or name not in reference or not bool(reference[name].isfinite().all()):
            continue
        error, _ = from_measured_error(
            actual=reference[name], expected=expected, scale=MEASURED_SCALE, typical=typical.get(name, 0.0)
        )
        probe = bounded_probe(
            name,
            actual=actual[name],
            expected=expected,
            bound=partial(_bound, actual[name], error),
            context="under autocast",
        )
        elsewhere = errors_elsewhere.get(name, []), plain_errors.get(name, [])
        probes.append(replace(probe, measure=partial(_with_draws, probe, expected, *elsewhere)))
    if not probes:
        raise Inapplicable("no tensor of the reference is finite under autocast")
    return probes


def _errors_elsewhere(
    context: CaseContext, plain: Callable[..., Any]
) -> tuple[dict[str, list[DrawnError]], dict[str, list[DrawnError]]]:
    """Errors of plain PyTorch and of the candidate under autocast, on further draws of the inputs.

    Raises:
        CandidateError: The candidate raised an exception.
    """
    reference, names = context.reference, context.differentiable
    errors_of = partial(drawn_errors, dtype=context.dtype, reference=reference, differentiable=names)
    of_plain = errors_of(plain, runs=further_runs(context, _PLAIN_DRAWS))
    # Another check asks whether the candidate changes its upstream gradients.
    runs = further_runs(context, _CANDIDATE_DRAWS)
    private = (replace(run, upstream=lent(run.upstream, owner=context.run)) for run in runs)
    with candidate_errors():
        return of_plain, errors_of(_under_autocast(context.candidate, context.case.device), runs=private)


def _with_draws(
    probe: Probe,
    expected: Tensor,
    candidate: Sequence[DrawnError],
    plain: Sequence[DrawnError],
    tensor: Tensor,
    standard: str,
) -> tuple[Measurement, ...]:
    """The probe's measurements, and the candidate's root mean square error over draws as a multiple of plain PyTorch's.

    A ratio of mean squares of m and n normal errors follows Fisher's F distribution. Each draw counts as one error, so
    elements of one draw may depend on each other. The oracle's size varies from draw to draw, and errors may follow it
    or not. Therefore a candidate fails only if its errors are larger both relative to the oracle and in absolute terms.
    """
    measurements = probe.measure(tensor, standard)
    here = DrawnError.of(tensor, expected)
    # The candidate need not be finite where plain PyTorch is not. Its draws are the first ones of plain PyTorch's.
    mine = [here, *(c for c, p in zip(candidate, plain, strict=False) if math.isfinite(p.relative))]
    plain = [p for p in plain if math.isfinite(p.relative)]
    if len(mine) < 2 or not math.isfinite(here.relative):
        return measurements
    ratios = [
        root_mean_square([getattr(e, kind) for e in mine]) / usual
        for kind in ("absolute", "relative")
        if (usual := root_mean_square([getattr(e, kind) for e in plain])) > 0
    ]
    if not ratios:  # plain PyTorch is exact here
        return measurements
    bound = _GRANTED_OVER_DRAWS * math.sqrt(_fisher_quantile(FALSE_ALARM, len(mine), len(plain)))
    over_draws = Measurement(
        probe.tensor,
        "error",
        min(ratios),
        bound,
        "times plain PyTorch's error",
        _source(_GRANTED_OVER_DRAWS),
        context=probe.context,
        draws=len(mine),
    )
    return (*measurements, over_draws)


def _source(scale: float) -> BoundSource:
    return BoundSource(BoundKind.MEASURED, scale=scale, dtype=dtype_name(_DTYPE), autocast=True)


def _fisher_quantile(false_alarm: float, m: int, n: int) -> float:
    """The number that a ratio of mean squares of m and n normal errors exceeds with probability ``false_alarm``.

    If F is such a ratio, n / (n + m F) follows the beta distribution with parameters n / 2 and m / 2 (Johnson, Kotz and
    Balakrishnan 1995, Continuous Univariate Distributions 2, chapter 27).
    """
    # Imported here because few processes of an audit need it. `scipy.stats` has a function for this quantile, but its
    # import takes twice as long, which is half as long as the import of torch.
    from scipy.special import betaincinv

    share = float(betaincinv(n / 2, m / 2, false_alarm))
    return n * (1 - share) / (m * share)


def _bound(actual: Tensor, error: Tensor, standard: str) -> ErrorBound:
    """The same under both standards, because the user of autocast asks for low precision.

    All elements may share the error, for example that of one rounded logit, which changes a coefficient of all.
    """
    return ErrorBound(error, error, actual.dtype, _source(MEASURED_SCALE))


def _applies(op: Op, case: Case) -> bool:
    return case.dtype == "fp32"  # autocast leaves float64 alone, and 16-bit inputs are cast already


CHECK = Check(
    "autocast",
    "under autocast to bf16, no tensor is further off than plain PyTorch's under the same autocast",
    _probes,
    applies=_applies,
)
