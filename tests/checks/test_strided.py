"""The check `strided` flags kernels that are right only for contiguous inputs, and passes kernels that read strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from ktonum.auditing.judge import run_check
from ktonum.case.context import CaseContext
from ktonum.checks import forward, gradients, strided
from ktonum.checks.check import Check
from ktonum.declare.cases import Point
from ktonum.declare.op import Op
from ktonum.results import CheckResult, Verdict
from subjects.planted import ALL, Change, as_if_contiguous, reading_past_the_end
from subjects.small_ops import RMS_NORM, rms_norm_with

POINT = Point({"N": 3, "H": 5}, {"eps": 1e-6})


def judged(candidate: Callable[..., Any], dtype: str, check: Check = strided.CHECK) -> CheckResult:
    """The check's result for a candidate of RMSNorm on three rows of five numbers."""
    op = replace(RMS_NORM, candidate=candidate, dims=[POINT])
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    return run_check(check, CaseContext(op, case))


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("read", [as_if_contiguous, reading_past_the_end], ids=lambda read: read.__name__)
def test_a_kernel_that_is_right_on_contiguous_inputs_only_is_flagged(read: Change, name: str) -> None:
    def receive(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**inputs, name: read(inputs[name])}

    wrong = rms_norm_with(receive=receive)
    for check in (forward.CHECK, gradients.CHECK):
        assert judged(wrong, "fp32", check).verdict is Verdict.PASS
    result = judged(wrong, "fp32")
    assert result.verdict is Verdict.FAIL, result


@pytest.mark.parametrize("dtype", ALL)
def test_a_kernel_that_reads_any_strides_passes(dtype: str) -> None:
    result = judged(rms_norm_with(), dtype)
    assert result.verdict is Verdict.PASS and not result.vacuous, result


def test_an_op_of_scalars_has_no_strides() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    op = Op(
        name="double", candidate=double, reference=double, sample=lambda draw: {"x": draw.normal()}, dims=[{"N": 1}]
    )
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    result = run_check(strided.CHECK, CaseContext(op, case))
    assert result.verdict is Verdict.INCONCLUSIVE and "no strides to change" in result.reason
