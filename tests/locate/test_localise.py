"""Planted defects are found where they were planted, and described correctly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.auditing.judge import check_named, run_check
from ktonum.case.context import CaseContext
from ktonum.declare.op import Op
from ktonum.kernels.audit.kto_op import OP
from ktonum.locate.localise import Surroundings, localise
from ktonum.measure.probe import Probe
from ktonum.results import CheckResult, Localisation, Verdict
from subjects.mutants import DEFECTS
from subjects.planted import Defect, times
from subjects.small_defects import LOSS_DEFECTS, NORM_DEFECTS
from subjects.small_ops import RMS_NORM, SOFTMAX_LOSS, rms_norm_with, softmax_loss_with

OPS: dict[str, tuple[Op, tuple[Defect, ...]]] = {
    "kto": (OP, DEFECTS),
    "softmax_loss": (SOFTMAX_LOSS, LOSS_DEFECTS),
    "rms_norm": (RMS_NORM, NORM_DEFECTS),
}
BOTH = ("fp32", "bf16")


@dataclass(frozen=True)
class Found:
    """A planted defect, the tensor that a report must name, and how its words on place and look must begin."""

    op: str
    defect: str
    check: str
    tensor: str
    where: str
    looks_like: str
    dtypes: tuple[str, ...] = BOTH


EVERYWHERE = "everywhere"
MISSING, TRUNCATED = "missing: zero", "truncated to 8 significant bits (bf16)"
FOUND = (
    Found("kto", "gradient halved", "gradients", "grad_weight", EVERYWHERE, "scaled by 1/2 = 0."),
    Found("kto", "gradient's sign flipped", "gradients", "grad_input", EVERYWHERE, "sign flipped"),
    Found("kto", "beta missing in the gradient", "gradients", "grad_input", EVERYWHERE, "scaled by 10", ("fp32",)),
    Found("kto", "mean over a wrong count", "gradients", "grad_weight", EVERYWHERE, "scaled by B/(B + 1) = 0.8"),
    Found("kto", "upstream gradient ignored", "gradients", "grad_input", EVERYWHERE, "scaled by 1/upstream_loss"),
    Found("kto", "upstream gradient ignored", "upstream", "grad_input scaled by 2^8", EVERYWHERE, "scaled by 2^-8"),
    Found("kto", "a row of grad_input zero", "gradients", "grad_input", "row [3, 6]", MISSING),
    Found("kto", "a row of grad_weight zero", "gradients", "grad_weight", "row 23", MISSING),
    Found(
        "kto",
        "last vocabulary tile of grad_weight missing",
        "gradients",
        "grad_weight",
        "the last tile along dim 0 (V), from 19 on",
        MISSING,
    ),
    Found(
        "kto",
        "last vocabulary tile of grad_bias missing",
        "gradients",
        "grad_bias",
        "the last tile along dim 0 (V), from 19 on",
        MISSING,
        ("fp32",),
    ),
    Found(
        "kto",
        "a tile of grad_weight unwritten",
        "written",
        "grad_weight",
        "the last tile along dim 0 (V), from 19 on",
        "NaN in 80 of 80 elements",
    ),
    Found("kto", "gradients truncated to bf16", "gradients", "grad_weight", EVERYWHERE, TRUNCATED, ("fp32",)),
    Found("kto", "logits rounded to bf16", "gradients", "grad_input", EVERYWHERE, "low precision", ("fp32",)),
    Found("kto", "weight scaled in place", "unmodified", "weight", EVERYWHERE, "scaled by (B + 1)/B = 1.25", ("fp32",)),
    Found("kto", "input cleared by backward", "unmodified", "input", EVERYWHERE, MISSING),
    Found("kto", "APO's sign wrong", "gradients", "grad_weight", EVERYWHERE, "sign flipped", ("fp32",)),
    Found(
        "kto",
        "bias gradient wrong without the input's",
        "gradient_subsets",
        "grad_bias requiring bias",
        EVERYWHERE,
        "sign flipped",
    ),
    Found(
        "kto",
        "gradient written over the input",
        "graph",
        "grad_input used elsewhere",
        EVERYWHERE,
        "one term missing: the error is -0.0",
    ),
    Found("softmax_loss", "gradient scaled by 1.01", "gradients", "grad_x", EVERYWHERE, "scaled by 1.01", ("fp32",)),
    Found("softmax_loss", "a row of the gradient zero", "gradients", "grad_x", "row 8", MISSING),
    Found(
        "softmax_loss",
        "a tile of the gradient unwritten, NaN there before",
        "written",
        "grad_x",
        "from 4 on along dim 0 (N)",
        "NaN in 185 of 185 elements",
    ),
    Found("softmax_loss", "upstream gradient ignored", "linearity", "grad_x", EVERYWHERE, "scaled by -1.3", ("fp32",)),
    Found("softmax_loss", "input clipped in place", "unmodified", "x", "scattered: ", "clipped at 1 in magnitude"),
    Found("softmax_loss", "target cleared in place", "unmodified", "target", EVERYWHERE, MISSING),
    Found("softmax_loss", "gradient clipped", "upstream", "grad_x scaled by 2^8", "scattered: ", "clipped at 4 in"),
    Found("softmax_loss", "NaN hidden", "nonfinite", "grad_x with", "row 4", "37 missing"),
    Found(
        "rms_norm",
        "last tile of grad_weight missing",
        "gradients",
        "grad_weight",
        "the last tile along dim 0 (H), from 43 on",
        MISSING,
    ),
    Found("rms_norm", "output truncated to bf16", "forward", "y", "", TRUNCATED),
    Found("rms_norm", "gradients truncated to bf16", "gradients", "grad_x", "", TRUNCATED),
    Found("rms_norm", "rows normalised in bf16", "forward", "y", EVERYWHERE, "low precision", ("fp32",)),
    Found("rms_norm", "upstream gradient scaled in place", "unmodified", "upstream_y", EVERYWHERE, "scaled by 1/2"),
    Found("rms_norm", "gradient a little short", "bias", "grad_x", EVERYWHERE, "scaled by 0.999", ("fp32",)),
    Found(
        "rms_norm", "gradient doubled by a second backward", "graph", "grad_x of a second", EVERYWHERE, "scaled by 2"
    ),
)  # fmt: skip


def failing(op: Op, candidate: Any, check: str, dtype: str) -> CheckResult:
    """The result of one check on the op's only case, which must be a FAIL."""
    planted = replace(op, candidate=candidate)
    (case,) = planted.cases(profile="quick", dtypes=[dtype], device="cpu")
    result = run_check(check_named(planted, case, check), CaseContext(planted, case))
    assert result.verdict is Verdict.FAIL, (result.verdict, result.reason)
    return result


def of(result: CheckResult, tensor: str) -> Localisation:
    """The localisation of the tensor with this name; without one, of the first tensor whose name begins with it."""
    named = [found for found in result.localisations if found.subject.startswith(tensor)]
    return next((found for found in named if found.subject == tensor), named[0])


@pytest.mark.parametrize(
    ("found", "dtype"),
    [pytest.param(f, d, id=f"{f.op}-{f.defect}-{f.check}-{d}") for f in FOUND for d in f.dtypes],
)
def test_a_planted_defect_is_found_and_named(found: Found, dtype: str) -> None:
    op, defects = OPS[found.op]
    (defect,) = (d for d in defects if d.name == found.defect)
    here = of(failing(replace(op, dims=[defect.point]), defect.candidate, found.check, dtype), found.tensor)
    assert here.where.startswith(found.where), here
    assert here.looks_like.startswith(found.looks_like), here


def _repeats_a_row(gradient: Tensor) -> Tensor:
    return torch.cat([gradient[:4], gradient[3:4], gradient[5:]])


def _shifts_rows(gradient: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(gradient[:1]), gradient[:-1]])


def _swaps_rows(gradient: Tensor) -> Tensor:
    return gradient[[0, 1, 7, 3, 4, 5, 6, 2, 8]]


def _one_sequence_doubled(gradient: Tensor) -> Tensor:
    return torch.cat([gradient[:5], 2 * gradient[5:6], gradient[6:]])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("change", "where", "looks_like"),
    [
        (_repeats_a_row, "row 4", "stale or repeated: the values of 3 along dim 0"),
        (_shifts_rows, EVERYWHERE, "shifted along dim 0 by 1"),
        (_swaps_rows, "elements", "indices along dim 0 permuted: 2 holds 7, 7 holds 2"),
        (_one_sequence_doubled, "row 5", "scaled by 2"),
    ],
)
def test_a_misplaced_row_is_named(change: Any, where: str, looks_like: str, dtype: str) -> None:
    candidate = softmax_loss_with(gradient={"x": change})
    here = of(failing(SOFTMAX_LOSS, candidate, "gradients", dtype), "grad_x")
    if where == "elements":
        assert here.where.startswith("2 of 9 indices along dim 0 (N): 2, 7"), here
    else:
        assert here.where == where, here
    assert here.looks_like.startswith(looks_like), here


@pytest.mark.parametrize("op", [SOFTMAX_LOSS, RMS_NORM], ids=lambda op: op.name)
def test_right_tensors_are_not_localised(op: Op) -> None:
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    context = CaseContext(op, case)
    for name in ("forward", "gradients", "unmodified"):
        assert run_check(check_named(op, case, name), context).localisations == ()


def _one_wrong_element(gradient: Tensor) -> Tensor:
    changed = gradient.clone()
    changed[3, 5] += 0.25
    return changed


def test_finite_differences_say_where_too() -> None:
    candidate = softmax_loss_with(gradient={"x": _one_wrong_element})
    (found,) = failing(SOFTMAX_LOSS, candidate, "gradcheck", "fp64").localisations
    words = ("element [3, 5], and perhaps others", "off by 0.25 from the finite difference")
    assert found == Localisation("grad_x", *words)


def test_only_failing_tensors_are_localised() -> None:
    result = failing(RMS_NORM, rms_norm_with(gradient={"weight": times(0.5)}), "gradients", "fp32")
    assert [found.tensor for found in result.localisations] == ["grad_weight"]


def test_results_carry_their_places_through_json() -> None:
    result = failing(SOFTMAX_LOSS, softmax_loss_with(gradient={"x": times(-1.0)}), "gradients", "fp32")
    assert result.localisations and CheckResult.from_record(result.to_record()) == result
    record = result.to_record()
    del record["localisations"]  # older reports do not have it
    assert CheckResult.from_record(record).localisations == ()


def test_localising_never_ends_a_verdict() -> None:
    def broken(standard: str) -> Any:
        raise ZeroDivisionError("planted")

    for probe, words in (
        (
            Probe("y", torch.zeros(3), lambda t, s: (), broken),
            "not found: localising raised ZeroDivisionError: planted",
        ),
        (Probe("y", torch.zeros(3), lambda t, s: ()), "not localised"),
    ):
        found = localise(probe, "precise", Surroundings)
        assert found.tensor == "y" and found.where.startswith(words) and found.looks_like == ""


def test_a_case_that_cannot_be_told_more_of_fails_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Surroundings, *known: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Surroundings, "__init__", exhausted)
    (found,) = failing(SOFTMAX_LOSS, softmax_loss_with(gradient={"x": times(0.5)}), "gradients", "fp32").localisations
    assert found.where == "not found: localising raised OutOfMemoryError: planted"
