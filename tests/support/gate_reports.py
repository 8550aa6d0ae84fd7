"""Reports that a gate compares: simulated ones, and edits of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ktonum.gate.decision import Gate, hold_against
from ktonum.results import CheckResult, Report, Verdict
from support.simulated_audits import ENVIRONMENT, SimulatedAudit

MODEL = SimulatedAudit()
BASELINE = MODEL.report(0)
OTHER_DEVICE = ENVIRONMENT | {"device": {"name": "NVIDIA H200", "capability": "sm_90", "multiprocessors": 132}}
OTHER_VERSIONS = ENVIRONMENT | {"packages": {"torch": "2.12.0", "triton": "3.6.0"}}

Edit = Callable[[CheckResult], CheckResult | None]


def gradients(tensor: str, dtype: str) -> bool:
    return tensor.startswith("grad_")


def times(factor: float, where: Callable[[str, str], bool] = lambda tensor, dtype: True) -> Callable[[str, str], float]:
    return lambda tensor, dtype: factor if where(tensor, dtype) else 1.0


def edited(report: Report, edit: Edit) -> Report:
    return replace(report, results=tuple(r for found in report.results if (r := edit(found)) is not None))


def one_case(change: Edit, check: str = "gradients") -> Edit:
    """The edit in a single check of a single case."""
    return lambda r: change(r) if (r.case, r.check) == ("model[N=3]-bf16-cuda", check) else r


def scaled(result: CheckResult, *, value: float = 1.0, bound: float = 1.0) -> CheckResult:
    """Errors and bounds multiplied; an error in units of its bound by the quotient."""
    measured = tuple(
        replace(m, value=m.value * value / bound)
        if m.unit == "bound"
        else replace(m, value=m.value * value, bound=m.bound * bound)
        for m in result.measurements
    )
    return replace(result, measurements=measured)


def failing(result: CheckResult, **changes: float) -> CheckResult:
    return replace(scaled(result, **changes), verdict=Verdict.FAIL, reason="too large", meets=())


def gate(current: Report, baseline: Report = BASELINE, **options: Any) -> Gate:
    return hold_against(baseline=baseline, current=current, **options)
