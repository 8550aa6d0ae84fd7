"""How the error grows with the length of a reduction, on data with mean zero and on positive data.

Ways of accumulation cannot be told apart over few terms, nor over many terms with mean zero. On positive data the
partial sums grow with the number of terms n, and each partial sum is rounded. With the roundoff u, the relative error
is u √(n/3) if terms are added one by one, see `ktonum.bounds.summation_variance`, and u √log2 n if they are added in
pairs. A low-precision accumulator stays within its bound over few terms, and is far beyond it over thousands. The same
holds for an output to which many chunks are added in its own dtype.
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

#: Lengths of a reduction. Bounds must hold at the longest; the others show how the error grows.
LENGTHS = (32, 256, 2048)
# An error that grows by a smaller factor than this over the lengths counts as not growing: chance alone may do that.
_GROWN = 2.0


def _probes(context: CaseContext) -> list[Probe]:
    dims = [name for name in context.op.reductions if name in context.case.point.dims]
    if not dims:
        raise Inapplicable(
            f"this point has none of the dims that the op reduces over: {', '.join(context.op.reductions)}"
        )
    return [p for dim in dims for data in ("mean zero", "positive") for p in _grown(context, dim, data)]


def _grown(context: CaseContext, dim: str, data: str) -> Iterator[Probe]:
    cases = [resized(context, {dim: length}) for length in LENGTHS]
    if data == "positive":
        cases = [varied(case, inputs=_positive(case.inputs), upstream=_positive(case.upstream)) for case in cases]
    for name, expected in cases[-1].expected().items():
        # By element and in norm, that is, without the sign. The check `bias` asks about the sign.
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
    """The probe's measurements, and the way of accumulation that fits the errors, which decides nothing."""
    error = compare(actual=tensor, expected=expected).relative_norm
    arithmetic = PRECISE.arithmetic(tensor.dtype, case.device)
    words = scheme([*shorter, error], stored=tensor.dtype, accumulator=arithmetic.accumulator)
    told = Measurement(probe.tensor, "relative_error", error, math.inf, context=probe.context, remark=words)
    return (*probe.measure(tensor, standard), told)


def scheme(errors: Sequence[float], *, stored: torch.dtype, accumulator: torch.dtype) -> str:
    """The way of accumulation that fits the relative ``errors`` at `LENGTHS`, in words.

    Args:
        errors: One for each length, the shortest first.
        stored: The dtype of the result.
        accumulator: The dtype in which sums should be accumulated.
    """
    first, last = errors[0], errors[-1]
    if not (math.isfinite(last) and math.isfinite(first)):
        return "not finite"
    # One rounding of the result has the root mean square error u / √3.
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
    "errors stay within their bounds when reductions have thousands of terms, also on positive data",
    _probes,
    applies=_applies,
)
