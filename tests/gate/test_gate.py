"""`ktonum gate` flags each kind of change with its cause, and does not flag an audit with other random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ktonum.auditing.in_process import audit_case
from ktonum.declare.op import Op
from ktonum.gate.decision import Attribution
from ktonum.gate.decision_report import closing_sentence
from ktonum.gate.grown_errors import FALSE_ALARM
from ktonum.gate.signed_rank import holm, signed_rank_p
from ktonum.results import BoundKind, BoundSource, Cause, CheckResult, Measurement, Report, Verdict
from subjects.small_ops import RMS_NORM, rms_norm_with
from support.combinations import few_or_many
from support.gate_reports import (
    BASELINE,
    MODEL,
    OTHER_DEVICE,
    OTHER_VERSIONS,
    Edit,
    edited,
    failing,
    gate,
    gradients,
    one_case,
    scaled,
    times,
)
from support.simulated_audits import ENVIRONMENT, SimulatedAudit


@pytest.mark.parametrize("n", [1, 4, 11, 30])
def test_the_rank_test_is_wilcoxons(n: int) -> None:
    wilcoxon = pytest.importorskip("scipy.stats").wilcoxon
    draw = np.random.default_rng(n)
    for shift in (-0.5, 0.0, 1.0):
        differences = draw.standard_normal(n) + shift
        right = wilcoxon(differences, alternative="greater", method="exact").pvalue
        assert signed_rank_p(list(differences)) == pytest.approx(right, abs=1e-12)


def test_ties_zeros_and_infinities_are_counted_exactly() -> None:
    assert signed_rank_p([]) == signed_rank_p([0.0, 0.0]) == 1.0
    assert signed_rank_p([0.1] * 9) == signed_rank_p([0.0, *[0.1] * 9]) == 2.0**-9
    assert signed_rank_p([math.inf, 0.1, 0.2]) == 1 / 8
    # The ranks are 1.5, 1.5 and 3. The possible sums are 6, 4.5 (twice), and so on down to 0.
    assert signed_rank_p([1.0, -1.0, 2.0]) == 3 / 8
    assert signed_rank_p([1.0] * 300) == pytest.approx(2.0**-300)


def test_the_rank_test_keeps_its_probability() -> None:
    """The differences have symmetric distributions, also with ties."""
    draw = np.random.default_rng(0)
    found = [signed_rank_p(list(np.round(draw.standard_t(1.5, 12), 1))) for _ in range(4000)]
    for rate in (0.01, 0.05, 0.3):
        share = float(np.mean(np.asarray(found) <= rate))
        assert rate / 3 < share < rate + 4 * math.sqrt(rate / 4000)


def test_holm_rejects_what_bonferroni_does_and_more() -> None:
    assert holm([0.01, 0.5, 0.02]) == pytest.approx([0.03, 0.5, 0.04])
    assert holm([0.03, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([]) == []


def test_an_identical_audit_passes_and_says_that_nothing_changed() -> None:
    same = gate(BASELINE)
    assert same.passed and same.changed == 0 and same.errors > 500
    assert not (same.growths or same.shrunk or same.environment or same.new or same.standards)


@few_or_many("pairs", 20, 200)
@pytest.mark.parametrize(
    ("audit", "baseline_inputs", "questions"),
    [(MODEL, 0, 2), (replace(MODEL, changed=0.4), 0, 2), (MODEL, 1, 4)],
    ids=["same inputs", "most numbers equal", "other inputs"],
)
def test_audits_drawn_anew_raise_no_more_false_alarms_than_stated(
    audit: SimulatedAudit, baseline_inputs: int, questions: int, pairs: int
) -> None:
    """There are two questions about errors, and if inputs and so bounds differ, two more about shares of bounds."""
    alarms = 0
    for i in range(pairs):
        before = audit.report(2 * i, inputs=100 * i + baseline_inputs)
        found = gate(audit.report(2 * i + 1, inputs=100 * i, baseline=2 * i), before)
        assert 0 < found.changed <= found.errors
        alarms += not found.passed
    rate = questions * FALSE_ALARM
    # At most three standard errors more than the stated rate.
    assert alarms <= pairs * rate + 3 * math.sqrt(pairs * rate * (1 - rate))


@pytest.mark.parametrize(
    ("where", "factor", "least"),
    [
        (lambda t, d: True, 1.1, 1.0),
        (gradients, 1.1, 1.0),
        (lambda t, d: t == "grad_w", 1.1, 1.0),
        (lambda t, d: gradients(t, d) and d == "bf16", 1.1, 0.55),
        (lambda t, d: gradients(t, d) and d == "bf16", 1.3, 0.97),
        # These tensors have one number, whose error is mostly chance.
        (lambda t, d: not gradients(t, d), 2.0, 0.93),
    ],
    ids=[
        "everything",
        "gradients",
        "one gradient",
        "gradients of one dtype",
        "by 30 % in one dtype",
        "numbers, doubled",
    ],
)
@few_or_many("pairs", 10, 40)
def test_growth_of_ten_per_cent_is_found_where_errors_are_steady(
    where: Callable[[str, str], bool], factor: float, least: float, pairs: int
) -> None:
    grown = replace(MODEL, error=times(factor, where))
    found = [gate(grown.report(2 * i + 1), MODEL.report(2 * i)) for i in range(pairs)]
    flagged = [g for g in found if any(x.attribution is Attribution.KERNEL_WORSE for x in g.growths)]
    assert all(not g.passed for g in flagged)
    # The share measured over 300 pairs, minus three standard errors for the number of pairs here.
    assert len(flagged) >= pairs * least - 3 * math.sqrt(pairs * least * (1 - least))


def test_growth_names_the_tensor_the_dtypes_and_the_ratio() -> None:
    found = gate(replace(MODEL, error=times(1.5, lambda t, d: t == "grad_w")).report(1))
    (norm,) = (g for g in found.growths if g.drift.what == "grad_w/relative_norm")
    assert norm.drift.dtype == "every dtype" and norm.attribution is Attribution.KERNEL_WORSE
    assert norm.drift.ratio == pytest.approx(1.5, rel=0.1) and norm.drift.bound_ratio == pytest.approx(1)
    assert norm.drift.larger == norm.drift.cases == 40 and norm.drift.p < 1e-8
    assert not any("grad_x" in g.drift.what for g in found.growths)


def test_shrinking_errors_are_reported_and_pass() -> None:
    found = gate(replace(MODEL, error=times(0.7)).report(1))
    assert found.passed and not found.growths
    assert {d.what for d in found.shrunk} >= {"grad_x/relative_norm", "grad_w/relative_norm"}


MEASURED = BoundSource(BoundKind.MEASURED, scale=4.0, dtype="bf16")


@pytest.mark.parametrize(
    ("source", "attribution"),
    [(MEASURED, Attribution.REFERENCE_BETTER), (MODEL.source, Attribution.BOUND_TIGHTER)],
)
def test_a_bound_that_shrinks_under_an_error_that_does_not_grow_is_not_the_kernels_doing(
    source: BoundSource, attribution: Attribution
) -> None:
    """Only bounds change: because of a better reference, or of a tighter analysis."""
    before, now = replace(MODEL, source=source), replace(MODEL, source=source, bound=times(0.5))
    found = gate(now.report(0), before.report(0))
    assert {g.attribution for g in found.growths} == {attribution}
    assert found.passed
    assert all(g.drift.bound_ratio == pytest.approx(0.5) for g in found.growths)
    # A smaller bound does not excuse a kernel that also got worse.
    worse = gate(replace(now, error=times(1.5)).report(0), before.report(0))
    assert Attribution.KERNEL_WORSE in {g.attribution for g in worse.growths} and not worse.passed


def test_a_looser_bound_does_not_hide_an_error_that_grew() -> None:
    found = gate(replace(MODEL, error=times(1.3), bound=times(2.0)).report(1))
    assert {g.attribution for g in found.growths} == {Attribution.KERNEL_WORSE} and not found.passed


def test_growth_on_another_device_is_reported_and_fails_when_strict() -> None:
    current = replace(MODEL, error=times(1.5)).report(1, OTHER_DEVICE)
    for strict in (False, True):
        found = gate(current, strict=strict)
        assert {g.attribution for g in found.growths} == {Attribution.DEVICE_NEW}
        assert found.environment["device name"] == ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
        assert found.passed is not strict


def test_other_versions_are_reported_and_excuse_nothing() -> None:
    found = gate(replace(MODEL, error=times(1.5)).report(1, OTHER_VERSIONS))
    assert found.environment == {"torch": ("2.11.0", "2.12.0")} and not found.device_new
    assert {g.attribution for g in found.growths} == {Attribution.KERNEL_WORSE} and not found.passed
    assert gate(MODEL.report(0, OTHER_VERSIONS)).passed


def vacuous(result: CheckResult) -> CheckResult:
    return replace(result, power=())


def raising(result: CheckResult) -> CheckResult:
    return replace(result, verdict=Verdict.ERROR, measurements=(), reason="raised", cause=Cause.CANDIDATE_WRONG)


def measured_on_reference(result: CheckResult) -> CheckResult:
    return replace(result, measurements=tuple(replace(m, bound_source=MEASURED) for m in result.measurements))


@pytest.mark.parametrize(
    ("before", "now", "environment", "attribution"),
    [
        (lambda r: r, lambda r: failing(r, value=50), ENVIRONMENT, Attribution.KERNEL_WORSE),
        (lambda r: r, raising, ENVIRONMENT, Attribution.KERNEL_WORSE),
        (lambda r: r, vacuous, ENVIRONMENT, Attribution.POWER_LOST),
        (lambda r: r, lambda r: failing(r, bound=0.02), ENVIRONMENT, Attribution.BOUND_TIGHTER),
        (
            measured_on_reference,
            lambda r: failing(measured_on_reference(r), bound=0.02),
            ENVIRONMENT,
            Attribution.REFERENCE_BETTER,
        ),
        (lambda r: r, lambda r: failing(r, value=50, bound=0.5), ENVIRONMENT, Attribution.KERNEL_WORSE),
        (lambda r: r, lambda r: failing(r, value=math.nan), ENVIRONMENT, Attribution.KERNEL_WORSE),
        (lambda r: r, lambda r: failing(r, value=50), OTHER_DEVICE, Attribution.DEVICE_NEW),
        (lambda r: None, lambda r: failing(r, value=50), ENVIRONMENT, Attribution.CASE_NEW),
    ],
    ids=["worse", "raises", "vacuous", "tighter", "reference", "both", "NaN", "device", "new case"],
)
def test_a_new_failure_is_attributed(
    before: Edit, now: Edit, environment: dict[str, object], attribution: Attribution
) -> None:
    current = edited(MODEL.report(0, environment), one_case(now))
    found = gate(current, edited(BASELINE, one_case(before)))
    (failure,) = found.failures
    assert failure.attribution is attribution and not found.passed
    assert (failure.result.case, failure.result.check) == ("model[N=3]-bf16-cuda", "gradients")


def test_failures_in_both_audits_are_known_and_those_only_in_the_baseline_are_fixed() -> None:
    broken = edited(BASELINE, one_case(lambda r: failing(r, value=50)))
    assert gate(broken, broken).passed and len(gate(broken, broken).known) == 1
    mended = gate(BASELINE, broken)
    assert mended.passed and len(mended.fixed) == 1


def test_vanished_results_fail_the_gate_and_new_ones_do_not() -> None:
    fewer = edited(BASELINE, one_case(lambda r: None))
    assert not gate(fewer).passed and [r.check for r in gate(fewer).vanished] == ["gradients"]
    more = gate(BASELINE, fewer)
    assert more.passed and [r.check for r in more.new] == ["gradients"]
    interrupted = replace(BASELINE, environment=ENVIRONMENT | {"audit": {"planned": len(BASELINE.results) + 1}})
    assert not gate(interrupted).passed and gate(interrupted).unfinished == 1


def test_results_that_became_inconclusive_fail_when_strict() -> None:
    silent = edited(BASELINE, one_case(lambda r: replace(r, verdict=Verdict.INCONCLUSIVE, measurements=())))
    assert gate(silent).passed and not gate(silent, strict=True).passed
    assert len(gate(silent).undecided) == 1
    assert not gate(silent, silent).undecided


def test_a_lost_standard_that_does_not_decide_is_reported() -> None:
    precise = edited(BASELINE, one_case(lambda r: replace(r, meets=("precise",))))
    assert gate(precise).standards == {("eager", Attribution.REFERENCE_BETTER): 1}
    worse = edited(BASELINE, one_case(lambda r: replace(scaled(r, value=1.2), meets=("precise",))))
    assert gate(worse).standards == {("eager", Attribution.KERNEL_WORSE): 1}
    exact = edited(BASELINE, one_case(lambda r: scaled(r, value=0.0)))
    assert gate(precise, exact).standards == {("eager", Attribution.KERNEL_WORSE): 1}
    assert gate(precise).passed


def test_another_number_of_draws_is_no_growth() -> None:
    def with_bias(draws: int, bound: float = 2.0**-7, **changes: Any) -> Edit:
        measured = Measurement("grad_x", "bias", 2.0**-10, bound, bound_source=MODEL.source, draws=draws)
        return one_case(lambda r: replace(r, measurements=(measured,), **changes))

    before = edited(BASELINE, with_bias(8))
    lost = edited(BASELINE, with_bias(16, meets=("precise",)))
    assert gate(lost, before).standards == {("eager", Attribution.REFERENCE_BETTER): 1}
    tighter = edited(BASELINE, with_bias(16, 2.0**-14, verdict=Verdict.FAIL, meets=()))
    (failure,) = gate(tighter, before).failures
    assert failure.attribution is Attribution.BOUND_TIGHTER


def test_too_few_cases_are_reported() -> None:
    few = replace(MODEL, cases=1)
    found = gate(replace(few, error=times(3.0)).report(1), few.report(0))
    assert found.passed and not found.enough_cases
    assert gate(MODEL.report(1)).enough_cases


def _less_precise(tensor: Tensor) -> Tensor:
    """Rounds to 22 significant bits, with two to four times the rounding error of float32."""
    rounded = ((tensor.detach().view(torch.int32) + 2) & -4).view(torch.float32)
    return tensor + (rounded - tensor.detach())


NORM = replace(RMS_NORM, dims=[{"N": 3 + i, "H": 40 + 9 * i} for i in range(12)])


def audited(op: Op, offset: int = 0) -> Report:
    cases = [
        replace(c, point=replace(c.point, parameters={"eps": 1e-6}), offset=offset)
        for c in op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    ]
    return Report(tuple(audit_case(op, case, check) for case in cases for check in ("forward", "gradients")))


def test_a_real_op_with_other_seeds_passes_and_one_less_precise_within_its_bounds_does_not() -> None:
    before = audited(NORM)
    anew = gate(audited(NORM, offset=1), before)
    assert anew.passed and anew.compared == 24 and anew.changed == anew.errors > 90, closing_sentence(anew)
    rounded = audited(replace(NORM, candidate=rms_norm_with(normed=_less_precise)))
    assert rounded.ok, "it was to be within its bounds"
    found = gate(rounded, before)
    assert not found.passed and {g.attribution for g in found.growths} == {Attribution.KERNEL_WORSE}
