"""The bounds that a standard grants a case: from the op's error model, or from the error of a run of the reference.

`ktonum.bounds.standard` says what is granted. This file applies it to the case's runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import MEASURED_SCALE, Arithmetic, ErrorBound, Standard, from_measured_error
from ktonum.bounds.standard import StandIn
from ktonum.case.runs import CaseRuns
from ktonum.case.variants import further_runs
from ktonum.declare.error_model import DerivedErrors
from ktonum.errors import KtonumError
from ktonum.measure.comparison import compare
from ktonum.measure.over_draws import drawn_errors, typical_errors
from ktonum.results import BoundKind, BoundSource

__all__ = ["bound_at_extremes", "granted_bounds"]

# Fewer elements than this do not tell how large an error typically is; as many further draws of the inputs do.
_ENOUGH_TO_AVERAGE = 64
_OTHER_DRAWS = 16


def granted_bounds(case: CaseRuns, standard: Standard) -> dict[str, ErrorBound]:
    """Bounds by tensor name, gradients as ``grad_NAME``, for every tensor of the oracle.

    Raises:
        KtonumError: The op's error model returned something else than `DerivedErrors`.
    """
    derived = _derived(case, standard.arithmetic(case.dtype, case.case.device))
    measured = _StandInRun(case, standard.stand_in(case.dtype))
    plain, plain_biases = case.plain.tensors(), standard.plain_biases(case.dtype)
    bounds = {}
    for name, expected in case.oracle.tensors().items():
        final = plain[name].dtype if name in plain else case.dtype
        if name in derived:
            errors = derived[name]
            source = BoundSource(BoundKind.DERIVED, standard.name)
            bound = ErrorBound(errors.independent, errors.coherent, final, source, errors.bias)
        else:
            bound = measured.bound(name, expected, final)
        if plain_biases:
            bias = abs(bound.bias) + plain_biases * abs(_signed_bias(plain.get(name), expected))
            bound = replace(bound, bias=bias)
        bounds[name] = bound
    return bounds


def bound_at_extremes(case: CaseRuns, name: str, own: ErrorBound, standard: Standard) -> ErrorBound:
    """``own``, the bound of the tensor ``name``, where an analysis to first order may not hold.

    If the standard follows plain PyTorch, the bound is no less than plain PyTorch's error, see
    `Standard.follows_plain`.
    """
    plain = case.plain.tensors().get(name)
    if not standard.follows_plain(case.dtype) or plain is None:
        return own
    expected = case.oracle.tensors()[name]
    of_plain = BoundSource(BoundKind.MEASURED, scale=MEASURED_SCALE, dtype=case.case.dtype)
    if bool((~plain.isfinite() & expected.isfinite()).any()):
        anything = torch.full_like(expected, math.inf)
        return ErrorBound(anything, anything, own.dtype, of_plain)
    measured, _ = from_measured_error(actual=plain, expected=expected, scale=MEASURED_SCALE)
    derived = own.source.kind is BoundKind.DERIVED
    source = replace(of_plain, kind=BoundKind.LARGER, standard=standard.name) if derived else of_plain
    return replace(
        own,
        independent=torch.maximum(own.independent.double(), measured),
        coherent=torch.maximum(own.coherent.double(), measured),
        source=source,
    )


def _derived(case: CaseRuns, arithmetic: Arithmetic) -> Mapping[str, DerivedErrors]:
    model = case.op.error_model
    if model is None:
        return {}
    derived: Mapping[str, Any] = model(case.inputs, case.parameters, case.upstream, case.oracle, arithmetic)
    for name, errors in derived.items():
        if not isinstance(errors, DerivedErrors):
            size = f" of {len(errors)}" if isinstance(errors, tuple) else ""
            raise KtonumError(
                f"the error model of op {case.op.name!r} returned a {type(errors).__name__}{size} for {name!r}: return "
                f"ktonum.DerivedErrors(independent, coherent), with bias=... where a bias is known"
            )
    return derived


def _signed_bias(actual: Tensor | None, expected: Tensor) -> float:
    """0 where the tensor is missing or not finite."""
    bias = 0.0 if actual is None else compare(actual=actual, expected=expected).signed_bias
    return bias if math.isfinite(bias) else 0.0


class _StandInRun:
    """The run of the reference whose error stands in for an analysis. It happens when a tensor needs it."""

    def __init__(self, case: CaseRuns, stand_in: StandIn) -> None:
        self._case = case
        self._stand_in = stand_in

    def bound(self, name: str, expected: Tensor, final: torch.dtype) -> ErrorBound:
        """The bound of the tensor ``name``, which is rounded to ``final`` in the end."""
        actual = self._tensors.get(name)
        if actual is None:
            actual = torch.full_like(expected, math.nan)
        typical = self._typical.get(name, 0.0) if expected.numel() < _ENOUGH_TO_AVERAGE else 0.0
        scale = self._stand_in.scale
        independent, coherent = from_measured_error(actual=actual, expected=expected, scale=scale, typical=typical)
        dtype = self._case.case.dtype if self._stand_in.plain else "fp32"
        source = BoundSource(BoundKind.MEASURED, scale=MEASURED_SCALE, dtype=dtype)
        return ErrorBound(independent, coherent, final, source)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return (self._case.plain if self._stand_in.plain else self._case.single).tensors()

    @cached_property
    def _typical(self) -> dict[str, float]:
        """Relative errors by tensor over further draws of the inputs."""
        case, dtype = self._case, self._case.dtype if self._stand_in.plain else torch.float32
        errors = drawn_errors(
            case.reference,
            dtype,
            reference=case.reference,
            runs=further_runs(case, _OTHER_DRAWS),
            differentiable=case.differentiable,
        )
        return typical_errors(errors, here=case.oracle.tensors(), cancelling=case.op.cancelling)
