"""Variants of a case are cases of their own, of the same kind."""

from __future__ import annotations

import torch

from ktonum.case.context import CaseContext
from ktonum.case.variants import further_runs, redrawn, resized, varied
from subjects.small_ops import NORM_POINT, RMS_NORM

(CASE,) = RMS_NORM.cases(profile="quick", dtypes=["fp32"], device="cpu")


def test_what_is_varied_has_an_oracle_of_its_own() -> None:
    context = CaseContext(RMS_NORM, CASE)
    doubled = varied(context, upstream={k: 2 * v for k, v in context.upstream.items()})
    assert isinstance(doubled, CaseContext) and doubled.inputs is context.inputs
    gradients = [case.oracle.gradients["x"] for case in (context, doubled)]
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(2 * gradients[0], gradients[1])
    assert float(doubled.bounds("precise")["grad_x"].independent.sum()) > 0


def test_another_size_has_other_inputs_and_leaves_the_case_as_it_is() -> None:
    context = CaseContext(RMS_NORM, CASE)
    larger = resized(context, {"N": NORM_POINT.dims["N"] + 1})
    assert larger.inputs["x"].shape[0] == context.inputs["x"].shape[0] + 1
    assert context.case == CASE and larger.case.name != CASE.name


def test_further_draws_differ_from_the_case_and_from_each_other_and_are_the_same_each_time() -> None:
    context = CaseContext(RMS_NORM, CASE)
    runs = list(further_runs(context, 2))
    drawn = [context.inputs["x"], *(run.inputs["x"] for run in runs)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(redrawn(context, 1).inputs["x"], drawn[2])
    assert all(run.upstream["y"] is context.upstream["y"] for run in runs)
