"""Words for one result: its case, its bound, its cause, and a failure in a few lines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ktonum.declare.cases import Case, Point
from ktonum.report.failure_text import describe_result
from ktonum.report.sentences import bound_words, reason_words, short_case
from ktonum.results import (
    BoundKind,
    BoundSource,
    CaseParts,
    Cause,
    Localisation,
    Measurement,
    Verdict,
)
from support.report_results import ANALYSIS, FAIL, result


def test_a_case_is_called_by_its_parts_or_by_its_name_if_they_are_unknown() -> None:
    case = Case("kto", Point({"B": 3}, {"loss_type": "apo"}, "heavy-tails"), "bf16", "cpu", 12)
    assert short_case(replace(FAIL, parts=case.parts)) == "bf16 B=3,loss_type=apo (heavy-tails) +12"
    assert short_case(replace(FAIL, case="something else", parts=CaseParts())) == "something else"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ANALYSIS, "rounding-error analysis, precise"),
        (BoundSource(BoundKind.MEASURED, scale=4.0, dtype="fp32"), "4 × the error of the reference in fp32"),
        (
            BoundSource(BoundKind.MEASURED, scale=2.0, dtype="bf16", autocast=True),
            "2 × the error of the reference under autocast to bf16",
        ),
        (
            BoundSource(BoundKind.LARGER, "eager", 4.0, "fp16"),
            "the larger one of rounding-error analysis, eager, and 4 × the error of the reference in fp16",
        ),
        (BoundSource(BoundKind.EXACT, text="law 'padding'"), "must be exact: law 'padding'"),
        (BoundSource(BoundKind.TABLE, text="row y/element/fp32/cpu"), "row y/element/fp32/cpu"),
        (BoundSource(BoundKind.ERROR_BAR, scale=2.0), "2 × the error bar of the finite difference"),
        (BoundSource(BoundKind.DECLARED), "declared by the op"),
        (BoundSource(BoundKind.NONE), ""),
    ],
)
def test_every_kind_of_bound_has_words(source: BoundSource, words: str) -> None:
    assert bound_words(source) == words


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_words(cause: Cause) -> None:
    verdict = Verdict.FAIL if cause is Cause.BEYOND_BOUND else Verdict.ERROR
    words = reason_words(replace(result(verdict, value=2.0, reason="own words"), cause=cause))
    says_it_all = (Cause.NOTHING_MEASURED, Cause.CUDA_LOST)
    assert words and words.endswith("own words") is (cause not in says_it_all)


def test_a_failure_says_first_what_is_wrong_and_last_the_numbers() -> None:
    """In order: the wrong tensors, the place, the pattern, the command to run it again, and the numbers."""
    places = (Localisation("loss", "everywhere", "scaled by 2"),)
    beyond = (
        *FAIL.measurements,
        Measurement("loss", "element", 3.0, 1.0, "bound", ANALYSIS, context="at expanded ones"),
        Measurement("y", "differing_elements", 2.0, 0.0, "elements", BoundSource(BoundKind.EXACT, text="law 'a'")),
        Measurement("z", "signed_bias", math.nan, 1.0, "1", ANALYSIS),
    )
    lines = describe_result(replace(FAIL, measurements=beyond, localisations=places)).splitlines()
    assert lines == [
        "FAIL: y, z and 2 more are wrong",
        "  where loss is wrong: everywhere",
        "  loss looks like: scaled by 2",
        "  run again: ktonum audit OP --only 'kto[B=3,T=65]-bf16-cpu::forward'",
        "  or: pytest --ktonum 'ktonum::kto[B=3,T=65]-bf16-cpu::forward'",
        "  measured: y/differing_elements = 2 elements, and none is allowed (must be exact: law 'a')",
        "  measured: z/signed_bias is NaN (rounding-error analysis, precise)",
        "  measured: loss/relative_norm = 325, 650 times the bound 0.5 (rounding-error analysis, precise) at [3, 17]",
        "  measured: loss at expanded ones/element: 3 times the bound (rounding-error analysis, precise)",
        "  the standard precise decides; the candidate meets eager here",
    ]
