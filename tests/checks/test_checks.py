"""The checks themselves: each one must flag the defects that it is for, and right implementations must pass."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from ktonum import checks
from ktonum.auditing.judge import check_named, run_check
from ktonum.case.context import CaseContext
from ktonum.checks import CHECKS, checks_for
from ktonum.checks.law import law_check
from ktonum.declare.cases import Case, Point
from ktonum.declare.drawing import Draw
from ktonum.declare.op import Op
from ktonum.kernels.audit.kto_laws import KTO_LAWS
from ktonum.kernels.audit.kto_op import OP
from ktonum.kernels.contract.reference import ReferenceKTOLoss
from ktonum.report.sentences import reason_words
from ktonum.results import STANDARDS, CheckResult, Verdict
from subjects.mutants import DEFECTS, MODEL, NONE, POINTS, DependsOnBatch, LogitsRounded
from subjects.plain_kto import PlainKTO
from subjects.planted import ALL, Defect
from subjects.small_defects import LOSS_DEFECTS, NORM_DEFECTS
from subjects.small_ops import RMS_NORM, SOFTMAX_LOSS
from support.combinations import combinations, covering, in_dtypes

#: Each op twice: with derived bounds and with measured ones.
SMALL = {
    "softmax_loss": (SOFTMAX_LOSS, LOSS_DEFECTS),
    "softmax_loss-measured": (replace(SOFTMAX_LOSS, error_model=None), LOSS_DEFECTS),
    "rms_norm": (RMS_NORM, NORM_DEFECTS),
    "rms_norm-measured": (replace(RMS_NORM, error_model=None), NORM_DEFECTS),
}


def _planted() -> list[Any]:
    """Every defect in every dtype in which it shows."""
    found = []
    for name, (op, defects) in {"kto": (OP, DEFECTS), **SMALL}.items():
        for defect in defects:
            shown = [d for d in defect.dtypes if d == "fp64" or set(defect.flagged_by) != {"gradcheck"}]
            for dtype, marks in in_dtypes(defect.name, shown, defect.flagged_by):
                # The names of the checks are in it, so `pytest -k strided` finds the defects that `strided` must flag.
                label = f"{name}-{defect.name}-{'+'.join(defect.flagged_by)}-{dtype}"
                found.append(pytest.param(op, defect, dtype, id=label, marks=marks))
    return found


#: Checks with long reductions or many draws, which take most of an audit's time.
LONG = ("growth", "bias")


def _points() -> list[Any]:
    """Every point in every dtype; by default each point in one dtype, and `LONG` only at `MODEL`."""
    short = [MODEL, *(replace(point, without=(*point.without, *LONG)) for point in POINTS if point is not MODEL)]
    pairs = list(itertools.product(short, ALL))
    kept = [pytest.param(*pairs[place]) for place in covering((short, ALL))]
    return kept + [pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in itertools.product(POINTS, ALL)]


#: Memory is counted on GPUs only; tests/checks/test_peak_memory.py imitates one.
_CHECKS_THAT_RUN_HERE = {check.name for check in CHECKS} - {"peak_memory"}


def case_of(op: Op, dtype: str) -> Case:
    """The op's only case of ``dtype``."""
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    return case


def audited(op: Op, dtype: str, standard: str = "precise") -> list[CheckResult]:
    """Every check on the op's only case of ``dtype``."""
    case = case_of(op, dtype)
    context = CaseContext(op, case)
    return [run_check(check, context, standard) for check in checks_for(op, case)]


def assert_all_pass(results: list[CheckResult]) -> None:
    """Every result passes. A law that the op does not promise may be INCONCLUSIVE instead."""
    for result in results:
        if result.verdict is Verdict.INCONCLUSIVE and "does not promise" in result.reason:
            continue
        assert result.verdict is Verdict.PASS, (result.case, result.check, result.reason)
        assert not result.vacuous, (result.case, result.check, result.reason)


PLANTED = _planted()


@pytest.mark.parametrize(("op", "defect", "dtype"), PLANTED)
def test_a_planted_defect_is_flagged(op: Op, defect: Defect, dtype: str) -> None:
    planted = replace(op, candidate=defect.candidate, dims=[defect.point])
    case = case_of(planted, dtype)
    context = CaseContext(planted, case)
    expected = Verdict.ERROR if defect.breaks else Verdict.FAIL
    for name in defect.flagged_by:
        if name == "gradcheck" and dtype != "fp64":
            continue  # it applies to float64 only
        result = run_check(check_named(planted, case, name), context)
        assert result.verdict is expected, (name, result.verdict, result.reason, result.details)
        assert result.failed and reason_words(result)


def test_every_file_with_a_check_is_registered() -> None:
    files = [importlib.import_module(f"ktonum.checks.{m.name}") for m in pkgutil.iter_modules(checks.__path__)]
    assert {file.CHECK for file in files if hasattr(file, "CHECK")} == set(CHECKS)


def test_every_defect_is_planted_in_the_default_run_and_every_check_asked() -> None:
    everything = {(id(op), defect.name) for op, defect, _ in (p.values for p in PLANTED)}
    by_default = [p.values for p in PLANTED if not p.marks]
    assert len(everything) == len(DEFECTS) + 2 * len(LOSS_DEFECTS) + 2 * len(NORM_DEFECTS)
    assert {(id(op), defect.name) for op, defect, _ in by_default} == everything
    asked = {(check, dtype) for _, defect, dtype in by_default for check in defect.flagged_by}
    assert _CHECKS_THAT_RUN_HERE <= {check for check, dtype in asked if check != "gradcheck" or dtype == "fp64"}


def test_every_check_and_every_law_of_kto_flags_something() -> None:
    flagging = {name for defect in (*DEFECTS, *LOSS_DEFECTS, *NORM_DEFECTS) for name in defect.flagged_by}
    promised = {law_check(law).name for law in KTO_LAWS if law.promised}
    assert _CHECKS_THAT_RUN_HERE | promised <= flagging


def test_every_check_flags_a_candidate_that_does_not_break() -> None:
    flagging = {name for d in (*DEFECTS, *LOSS_DEFECTS, *NORM_DEFECTS) if not d.breaks for name in d.flagged_by}
    assert _CHECKS_THAT_RUN_HERE <= flagging


def test_a_promised_law_decides_and_another_is_only_reported() -> None:
    (law,) = (law for law in KTO_LAWS if not law.promised)
    for promised, verdict in ((False, Verdict.INCONCLUSIVE), (True, Verdict.FAIL)):
        laws = (replace(law, promised=promised),)
        op = replace(OP, candidate=DependsOnBatch, dims=[NONE], laws=laws)
        result = run_check(law_check(*laws), CaseContext(op, case_of(op, "fp32")))
        assert result.verdict is verdict and "law 'batch invariance'" in reason_words(result)
    right = replace(OP, dims=[NONE])
    result = run_check(law_check(law), CaseContext(right, case_of(right, "fp32")))
    assert result.verdict is Verdict.PASS and not result.vacuous


def test_every_defect_is_flagged_by_something_in_some_dtype() -> None:
    for defect in (*DEFECTS, *LOSS_DEFECTS, *NORM_DEFECTS):
        assert defect.flagged_by and defect.dtypes, defect.name
        assert set(defect.flagged_by) != {"gradcheck"} or "fp64" in defect.dtypes, defect.name


@pytest.mark.parametrize(("point", "dtype"), _points())
def test_a_right_kto_loss_passes_every_check(point: Point, dtype: str) -> None:
    assert_all_pass(audited(replace(OP, candidate=PlainKTO, dims=[point]), dtype))


@pytest.mark.parametrize(("point", "dtype"), _points())
def test_plain_pytorch_meets_eager(point: Point, dtype: str) -> None:
    assert_all_pass(audited(replace(OP, candidate=ReferenceKTOLoss, dims=[point]), dtype, "eager"))


@combinations("held, dtype", itertools.product(SMALL, STANDARDS), ALL, ids=str)
def test_right_small_ops_pass_every_check(held: tuple[str, str], dtype: str) -> None:
    name, standard = held
    assert_all_pass(audited(SMALL[name][0], dtype, standard))


@combinations("name, dtype", ("softmax_loss-measured", "rms_norm-measured"), ALL)
def test_the_reference_itself_meets_eager(name: str, dtype: str) -> None:
    # In float64 the reference is the oracle. Its error is zero, and a multiple of zero as a bound would fail every run.
    op = SMALL[name][0]
    assert_all_pass(audited(replace(op, candidate=op.reference), dtype, "eager"))


@pytest.mark.exhaustive  # `./run audit` checks the same
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_pass_every_check(dtype: str) -> None:
    assert_all_pass(audited(replace(OP, dims=[MODEL]), dtype))


def test_rounded_logits_meet_eager_alone() -> None:
    op = replace(OP, candidate=LogitsRounded, dims=[MODEL])
    result = run_check(check_named(op, case_of(op, "bf16"), "forward"), CaseContext(op, case_of(op, "bf16")))
    assert result.verdict is Verdict.FAIL and result.meets == ("eager",)


def _first_sequence_masked(draw: Draw) -> dict[str, Any]:
    inputs = OP.sample(draw)
    inputs["target"][0] = -100
    return inputs


@combinations("reduction, dtype", ("mean", "sum", "none"), ALL)
def test_a_sequence_without_a_loss_is_no_error(reduction: str, dtype: str) -> None:
    # Its average log-probability is 0/0, NaN on both sides.
    parameters = {"average_log_prob": True, "reduction": reduction}
    without = LONG + (("gradcheck",) if reduction == "none" else ())  # no differences of NaN
    point = Point({"B": 4, "T": 5, "H": 8, "V": 11}, parameters, without=without)
    results = audited(replace(OP, candidate=PlainKTO, sample=_first_sequence_masked, dims=[point]), dtype)
    assert_all_pass(results)
    # A planted defect must be flagged because of its size, and not because of the NaN.
    found = [p for r in results if r.check == "forward" for p in r.power]
    sizes = [p.size for p in found if p.tensor == "loss" and p.unit]
    assert sizes and all(size is not None and size > 1e-16 for size in sizes)


def _wrong_where_masked(**kwargs: Any) -> Any:
    class Mutant(PlainKTO):
        def reduced(self, losses: torch.Tensor) -> torch.Tensor:
            return super().reduced(losses).nan_to_num()

    return Mutant(**kwargs)


def test_a_number_where_there_is_no_loss_is_an_error() -> None:
    point = Point({"B": 4, "T": 5, "H": 8, "V": 11}, {"average_log_prob": True, "reduction": "none"})
    op = replace(OP, candidate=_wrong_where_masked, sample=_first_sequence_masked, dims=[point])
    result = run_check(check_named(op, case_of(op, "fp32"), "forward"), CaseContext(op, case_of(op, "fp32")))
    assert result.verdict is Verdict.FAIL and result.worst is not None and result.worst.where == (0,)
