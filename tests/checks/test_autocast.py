"""The check `autocast`: several draws of the inputs show errors that one hides, and right candidates pass easily."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.checks.autocast import CHECK
from ktonum.declare.cases import Case
from ktonum.declare.evaluation import Run
from ktonum.declare.op import Op
from ktonum.errors import CandidateError
from ktonum.measure.over_draws import DrawnError, drawn_errors
from ktonum.results import Measurement
from subjects.mutants import LogpsLeftToAutocast
from subjects.small_ops import NORM_POINT, RMS_NORM


@pytest.fixture(scope="module", params=[700, pytest.param(2000, marks=pytest.mark.exhaustive)])
def cases(request: pytest.FixtureRequest) -> list[tuple[Op, Case]]:
    """All KTO cases in float32 among the first cases of the long count of false alarms."""
    count = importlib.import_module("count_false_alarms")
    numbered = (count.case_number(i) for i in range(request.param))
    return [(op, case) for s, op, case in numbered if s.label == "kto, float32 inside" and case.dtype == "fp32"]


def _measured(op: Op, case: Case) -> Iterator[Measurement]:
    assert CHECK.probes is not None
    for probe in CHECK.probes(CaseContext(op, case)):
        yield from probe.measure(probe.actual, "precise")


def test_log_probabilities_in_bfloat16_show_over_several_draws(cases: list[tuple[Op, Case]]) -> None:
    by_draws = by_one = 0
    for op, case in cases:
        found = list(_measured(replace(op, candidate=LogpsLeftToAutocast), case))
        by_draws += any(not m.within for m in found if m.draws)
        by_one += any(not m.within for m in found if not m.draws)
    # 10 and 0 of 11, 29 and 1 of 31. On another CPU, matrix products round a little differently.
    assert len(cases) in (11, 31) and by_draws >= 0.85 * len(cases) and by_one <= 0.13 * len(cases)


def test_a_right_candidate_is_far_from_the_bound(cases: list[tuple[Op, Case]]) -> None:
    over_draws = [m.use for op, case in cases for m in _measured(op, case) if m.draws]
    assert len(over_draws) > 8 * len(cases) and 0.1 < max(over_draws) < 0.4


def test_a_candidate_that_breaks_on_another_draw_breaks() -> None:
    calls = []

    def raising_on_another_draw(**inputs: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise ValueError("planted")
        candidate = RMS_NORM.candidate
        assert callable(candidate)
        result: Tensor = candidate(**inputs)
        return result

    op = replace(RMS_NORM, candidate=raising_on_another_draw, dims=[NORM_POINT])
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    with pytest.raises(CandidateError, match="planted"):
        list(_measured(op, case))


def test_a_candidate_that_is_not_finite_on_another_draw_is_flagged() -> None:
    calls = []

    def lost_on_another_draw(**inputs: Tensor) -> dict[str, Tensor]:
        calls.append(None)
        candidate = RMS_NORM.candidate
        assert callable(candidate)
        result: dict[str, Tensor] = candidate(**inputs)
        return {k: v * torch.nan for k, v in result.items()} if len(calls) > 2 else result

    op = replace(RMS_NORM, candidate=lost_on_another_draw, dims=[NORM_POINT])
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    beyond = {m.name for m in _measured(op, case) if not m.within}
    assert "y under autocast/error over 5 draws" in beyond and all("draws" in name for name in beyond)


def test_drawn_errors_are_absolute_and_relative_and_leave_out_useless_runs() -> None:
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    error = DrawnError.of(expected.float() + 0.5, expected)
    assert error.absolute == pytest.approx(0.5 * 2**0.5) and error.relative == pytest.approx(0.1 * 2**0.5)
    runs = [Run({"x": torch.full((2,), value)}, {}, {}) for value in (1.0, 0.0, float("inf"), 2.0, 3.0)]
    found = drawn_errors(
        lambda x: {"y": torch.where(x == 3, torch.nan, 1.25 * x)},
        torch.float32,
        reference=lambda x: {"y": x},
        runs=runs,
        differentiable=(),
    )
    assert [e.relative for e in found["y"]] == [0.25, 0.25, torch.inf]
