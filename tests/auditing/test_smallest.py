"""The search for the smallest failing case, on simple predicates and on planted defects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from ktonum.auditing.judge import check_named, run_check
from ktonum.auditing.reduce.smallest_case import MOST_RUNS, fails_with, reduced, smallest_case
from ktonum.case.context import CaseContext
from ktonum.declare.cases import Case, Point
from ktonum.results import Verdict
from subjects.planted import last_tile_missing, times
from subjects.small_ops import SOFTMAX_LOSS, softmax_loss_with

CASE = Case("kto", Point({"B": 3, "T": 47, "H": 136, "V": 300}, {"beta": 0.3}), "fp32", "cpu")

Dims = Mapping[str, int]


@pytest.mark.parametrize(
    ("fails", "smallest"),
    [
        (lambda d: True, {"B": 1, "T": 1, "H": 1, "V": 1}),
        (lambda d: d["V"] > 256, {"B": 1, "T": 1, "H": 1, "V": 257}),
        (lambda d: d["V"] > 32, {"B": 1, "T": 1, "H": 1, "V": 33}),
        (lambda d: d["B"] > 1, {"B": 2, "T": 1, "H": 1, "V": 1}),
        (lambda d: False, dict(CASE.point.dims)),
    ],
)
def test_dims_shrink_as_long_as_it_fails(fails: Callable[[Dims], bool], smallest: Dims) -> None:
    found = reduced(CASE, lambda case: fails(case.point.dims), most_runs=100)
    assert found.case.point.dims == smallest
    assert found.case.point.parameters == {"beta": 0.3} and found.case.offset == 0 and not found.exhausted


def test_the_number_of_runs_is_bounded() -> None:
    seen: list[Case] = []

    def never(case: Case) -> bool:
        seen.append(case)
        return False

    found = reduced(CASE, never)
    assert found.case == CASE and found.exhausted and found.runs == len(seen) == MOST_RUNS
    assert len({case.name for case in seen}) == MOST_RUNS


def test_another_seed_is_tried_only_if_the_first_one_shows_nothing() -> None:
    small = replace(CASE, point=Point({"N": 2}))
    found = reduced(small, lambda case: case.offset == 1)
    assert (found.case.point.dims, found.case.offset) == ({"N": 1}, 1)
    assert found.case.seed != replace(found.case, offset=0).seed


def test_a_planted_defect_is_reduced_to_the_smallest_dims_that_show_it() -> None:
    op = replace(SOFTMAX_LOSS, candidate=softmax_loss_with(gradient={"x": last_tile_missing}))
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    told: list[Case] = []
    found = smallest_case(op, case, "gradients", "grad_x", on_smaller=told.append)
    assert found.runs <= MOST_RUNS and told[-1] == found.case
    # One class has no gradient, so two classes are the fewest. The number of rows does not matter.
    assert found.case.point.dims == {"N": 1, "V": 2}, found
    result = run_check(check_named(op, found.case, "gradients"), CaseContext(op, found.case))
    assert result.verdict is Verdict.FAIL and fails_with(result, "grad_x")


def test_a_right_candidate_is_not_reduced() -> None:
    (case,) = SOFTMAX_LOSS.cases(profile="quick", dtypes=["fp32"], device="cpu")
    assert smallest_case(SOFTMAX_LOSS, case, "gradients", "grad_x").case == case


def test_another_tensor_is_another_failure() -> None:
    op = replace(SOFTMAX_LOSS, candidate=softmax_loss_with(gradient={"x": times(-1.0)}))
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    result = run_check(check_named(op, case, "gradients"), CaseContext(op, case))
    assert fails_with(result, "grad_x") and fails_with(result, "") and not fails_with(result, "grad_weight")
