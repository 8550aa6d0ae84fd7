"""Under autocast the candidate is no worse than plain PyTorch under the same autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound, from_measured_error
from ktonum.cases import Case
from ktonum.checks.check import Check, Inapplicable
from ktonum.context import MEASURED_SCALE, CaseContext, candidate_errors
from ktonum.errors import CandidateError
from ktonum.evaluation import evaluate
from ktonum.op import Op
from ktonum.probe import Probe, bounded_probe

__all__ = ["CHECK"]

_DTYPE = torch.bfloat16


def _under_autocast(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The forward alone runs under autocast, as torch asks for."""

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
            context.lent(context.inputs),
            differentiable=names,
            upstream=context.lent(context.upstream),
        )
    for name, gradient in context.result.gradients.items():
        if gradient is not None and result.gradients.get(name) is None:
            raise CandidateError(f"gave no gradient for {name!r} under autocast, and one without it")
    actual, typical = result.tensors(), context.typical_errors(plain, context.dtype)
    probes = []
    for name, expected in context.expected().items():
        if name not in actual or name not in reference or not bool(reference[name].isfinite().all()):
            continue
        error, _ = from_measured_error(
            actual=reference[name], expected=expected, scale=MEASURED_SCALE, typical=typical.get(name, 0.0)
        )
        probes.append(
            bounded_probe(
                f"{name} under autocast",
                actual=actual[name],
                expected=expected,
                bound=partial(_bound, actual[name], error),
            )
        )
    if not probes:
        raise Inapplicable("the reference is not finite under autocast")
    return probes


def _bound(actual: Tensor, error: Tensor, standard: str) -> ErrorBound:
    """The same under both standards: autocast asks for low precision.

    The error may be shared by all elements, as a coefficient's is: the mistake of one rounded logit.
    """
    source = f"{MEASURED_SCALE:g} × the error of the reference under autocast to bf16"
    return ErrorBound(error, error, actual.dtype, source)


def _applies(op: Op, case: Case) -> bool:
    return case.dtype == "fp32"  # autocast leaves float64 alone, and 16-bit inputs are cast already


CHECK = Check(
    "autocast", "under autocast to bf16 no tensor is worse than plain PyTorch's under it", _probes, applies=_applies
)
