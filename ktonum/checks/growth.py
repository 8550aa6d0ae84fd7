"""The error as a reduction grows, on data of mean zero and on positive data.

Accumulation schemes look alike over few terms, and over many of mean zero. On positive data the partial sums grow with
the number of terms, and each is rounded: added one by one in roundoff u the relative error is u √(n/3), see
`ktonum.bounds.summation_variance`; added pairwise, u √log2 n. A low-precision accumulator, or one output to which many
chunks are added in its own dtype, is within its bound over a few terms and far beyond it over thousands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import PRECISE, unit_roundoff
from ktonum.case.context import CaseContext
from ktonum.case.variants import resized, varied
from ktonum.checks.check import Check, Inapplicable
from ktonum.declare.cases import Case, dtype_name
from ktonum.declare.op import Op
from ktonum.measure.comparison import compare
from ktonum.measure.probe import Probe, bounded_probe
from ktonum.results import Measurement

__all__ = ["CHECK", "scheme"]

#: A reduction's lengths. The longest is where the bounds must hold; the others tell how the error got there.
LENGTHS = (32, 256, 2048)
# An error that grows by less than this over the lengths does not grow: its own chance is that large.
_GROWN = 2.0


def _probes(context: CaseContext) -> list[Probe]:
    dims = [name for name in context.op.reductions if name in context.case.point.dims]
    if not dims:
        raise Inapplicable(f"no dim among {', '.join(context.op.reductions)} is one of this point's")
    return [p for dim in dims for data in ("mean zero", "positive") for p in _grown(context, dim, data)]


def _grown(context: CaseContext, dim: str, data: str) -> Iterator[Probe]:
    cases = [resized(context, {dim: length}) for length in LENGTHS]
    if data == "positive":
        cases = [varied(case, inputs=_positive(case.inputs), upstream=_positive(case.upstream)) for case in cases]
    for name, expected in cases[-1].expected().items():
        # By element and in norm: how large, not of which sign. The check `bias` asks that.
        probe = bounded_probe(
            name,
            actual=cases[-1].result.tensors()[name],
            expected=expected,
            bound=partial(cases[-1].bound_at_extremes, name),
            enough=None,
            context=f"at {dim} = {LENGTHS[-1]}, {data}",
        )
        shorter = [_relative_error(case, name) for case in cases[:-1]]
        yield replace(probe, measure=partial(_with_scheme, probe, expected, shorter, context.case))


def _positive(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _relative_error(case: CaseContext, name: str) -> float:
    tensors = case.result.tensors()
    return (
        compare(actual=tensors[name], expected=case.oracle.tensors()[name]).relative_norm
        if name in tensors
        else math.nan
    )


def _with_scheme(
    probe: Probe, expected: Tensor, shorter: Sequence[float], case: Case, tensor: Tensor, standard: str
) -> tuple[Measurement, ...]:
    """The probe's measurements, and the accumulation scheme that fits; that one is told and decides nothing."""
    error = compare(actual=tensor, expected=expected).relative_norm
    arithmetic = PRECISE.arithmetic(tensor.dtype, case.device)
    words = scheme([*shorter, error], stored=tensor.dtype, accumulator=arithmetic.accumulator)
    told = Measurement(probe.tensor, "relative_error", error, math.inf, context=probe.context, remark=words)
    return (*probe.measure(tensor, standard), told)


def scheme(errors: Sequence[float], *, stored: torch.dtype, accumulator: torch.dtype) -> str:
    """What accumulation fits relative ``errors`` at `LENGTHS`, in words.

    Args:
        errors: One for each length, shortest first.
        stored: What the result is rounded to.
        accumulator: What sums should be accumulated in.
    """
    first, last = errors[0], errors[-1]
    if not (math.isfinite(last) and math.isfinite(first)):
        return "not finite"
    # One rounding of the result errs by u / √3 in the root mean square.
    if last <= _GROWN * unit_roundoff(stored) / math.sqrt(3) and unit_roundoff(stored) > unit_roundoff(accumulator):
        return f"hidden by rounding to {dtype_name(stored)}"
    if last <= _GROWN * first:
        return "not growing"
    predicted = {}
    for dtype in dict.fromkeys((accumulator, torch.float32, torch.float16, torch.bfloat16)):
        u = unit_roundoff(dtype)
        predicted[f"blocked in {dtype_name(dtype)}"] = u * math.sqrt(math.log2(LENGTHS[-1]))
        predicted[f"one by one in {dtype_name(dtype)}"] = u * math.sqrt(LENGTHS[-1] / 3)
    return "as " + min(predicted, key=lambda words: abs(math.log(last / predicted[words])))


def _applies(op: Op, case: Case) -> bool:
    return bool(op.reductions)


CHECK = Check(
    "growth",
    "errors stay within their bounds as reductions grow to thousands of terms, on positive data, too",
    _probes,
    applies=_applies,
)
