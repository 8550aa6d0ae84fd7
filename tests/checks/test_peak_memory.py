"""The check `peak_memory` without a GPU: the test replaces torch's counters, and the check computes with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ktonum.auditing.judge import run_check
from ktonum.case.context import CaseContext
from ktonum.checks import checks_for
from ktonum.checks.peak_memory import CHECK
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.results import CheckResult, Verdict
from subjects.small_ops import NORM_POINT, RMS_NORM

#: Bytes in use before a run, and the inputs of `NORM_POINT` in float32: (11 × 48 + 48) numbers.
_BEFORE, _INPUTS = 10_000, 4 * (11 * 48 + 48)


def _declaring(granted: float) -> Op:
    return replace(RMS_NORM, peak_memory=lambda dims, parameters, dtype: granted + 0.0 * dims["N"] * len(dtype))


def _judged(op: Op, device: str) -> CheckResult:
    case = Case(op.name, NORM_POINT, "fp32", device)
    return run_check(CHECK, CaseContext(op, case, torch.device("cpu")))


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that takes 5,000 bytes besides the copies of its inputs."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: _BEFORE)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: _BEFORE + _INPUTS + 5_000)


@pytest.mark.usefixtures("counters")
def test_as_much_as_declared_passes_and_a_byte_more_would_not() -> None:
    result = _judged(_declaring(5_000), "cuda")
    assert result.verdict is Verdict.PASS and not result.vacuous
    assert result.measurements[0].value == 5_000
    assert [p.size for p in result.power] == [1.0]


@pytest.mark.usefixtures("counters")
def test_more_than_declared_fails() -> None:
    result = _judged(_declaring(4_999), "cuda")
    assert result.verdict is Verdict.FAIL and "5000 bytes" in result.reason and "4999" in result.reason


def test_without_a_gpu_it_cannot_tell() -> None:
    result = _judged(_declaring(1), "cpu")
    assert result.verdict is Verdict.INCONCLUSIVE and "runs on cpu" in result.reason


def test_the_check_needs_a_declaration_and_a_gpu() -> None:
    assert CHECK in checks_for(_declaring(1), Case("rms_norm", NORM_POINT, "fp32", "cuda"))
    assert CHECK not in checks_for(_declaring(1), Case("rms_norm", NORM_POINT, "fp32", "cpu"))
    assert CHECK not in checks_for(RMS_NORM, Case("rms_norm", NORM_POINT, "fp32", "cuda"))
