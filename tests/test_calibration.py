"""Calibration: what is measured, how its tail is fitted, and that tables can only tighten in silence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_defects import OPS
from scipy import stats
from small_ops import RMS_NORM

from ktonum.calibration.blocks import FIRST_SEED, Block, Wanted, blocks_of, candidates_in_words, right_candidates
from ktonum.calibration.comparison import hold_against_rows
from ktonum.calibration.items import BlockWork, SamplesFile
from ktonum.calibration.revision import revise_rows
from ktonum.calibration.rows import Pool, Stratum, pool_samples, row_of
from ktonum.calibration.samples import append_samples, made_with, read_samples
from ktonum.calibration.sampling import sample_block
from ktonum.calibration.tails import LEAST, describe_sample, exceedance, fit_tail, tail_tolerance
from ktonum.checks import checks_for
from ktonum.context import CaseContext
from ktonum.errors import UsageError
from ktonum.kernels.kto_op import OP as KTO
from ktonum.op import Op
from ktonum.results import Verdict
from ktonum.runner import check_named, run_check
from ktonum.tables import Row, Table

BUDGET: dict[str, Any] = {"false_alarm": 1e-6}
RIGHT = ("upcast",)


def drawn(distribution: Any, count: int, seed: int = 0) -> list[float]:
    return [float(x) for x in distribution.rvs(size=count, random_state=np.random.default_rng(seed))]


LIGHT = {
    "exponential": stats.expon(),
    "half normal": stats.halfnorm(),
    "uniform": stats.uniform(),
    "largest of 1000 normal": stats.exponweib(a=1000, c=2, scale=math.sqrt(2)),
}


@pytest.mark.parametrize("count", [200, 1000])
@pytest.mark.parametrize("name", LIGHT)
def test_a_tolerance_keeps_its_budget_where_the_distribution_is_known(name: str, count: int) -> None:
    """The rate at which fresh errors exceed it, exactly, over 60 samples: the mean is what an audit meets."""
    found = [describe_sample([drawn(LIGHT[name], count, seed)], bound=math.inf, **BUDGET) for seed in range(60)]
    by_tail = [e for e in found if e.decided_by == "tail"]
    assert len(by_tail) >= 50, [e.decided_by for e in found]
    assert float(np.mean([LIGHT[name].sf(e.tolerance) for e in by_tail])) <= 1e-6
    # No vacuous tolerance either: a few times the largest of the sample.
    assert max(e.tolerance / e.maximum for e in by_tail) < 7


@pytest.mark.parametrize("name", LIGHT)
def test_a_good_fit_is_not_rejected_more_often_than_it_says(name: str) -> None:
    fits = np.array([fit_tail(sorted(drawn(LIGHT[name], 300, seed)))[0].fit for seed in range(200)])
    # 0.05 and 0.5, and three standard errors of two hundred fits.
    assert np.mean(fits < 0.05) < 0.1 and np.mean(fits < 0.5) < 0.61


@pytest.mark.parametrize("level", [0.1, 0.01, 1e-3])
def test_fitted_levels_are_those_of_the_distribution(level: float) -> None:
    reached = []
    for seed in range(20):
        tail, why = fit_tail(sorted(drawn(stats.expon(), 2000, seed)))
        assert tail.exceeding == 400, why
        reached.append(float(stats.expon.sf(exceedance(tail, samples=2000, level=level))))
    assert float(np.mean(reached)) == pytest.approx(level, rel=0.25)


def test_a_level_that_the_tail_does_not_hold_is_refused() -> None:
    tail, _ = fit_tail(sorted(drawn(stats.expon(), 400)))
    with pytest.raises(ValueError, match=r"level 0\.3: the tail holds 0\.2"):
        exceedance(tail, samples=400, level=0.3)


def lump(count: int) -> list[float]:
    """A tail that is two lumps far apart, as of two kernels in one sample."""
    return [
        float(x) for x in np.r_[np.linspace(0, 1, count - 60), 1 + np.linspace(0, 0.01, 40), np.linspace(9, 9.1, 20)]
    ]


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        (drawn(stats.halfnorm(), LEAST - 1), "99 samples, fewer than 100"),
        (drawn(stats.cauchy(), 2000), "heavier than exponential|fits poorly"),
        ([0.0] * 500, "every error is zero"),
        ([0.0, 0.5, 1.0] * 200, "distinct errors above the threshold, fewer than 20"),
        (lump(300), "fits poorly, p = "),
    ],
    ids=["small", "heavy", "zeros", "repeated", "two lumps"],
)
def test_where_the_tail_cannot_decide_the_bound_does_and_says_why(sample: list[float], why: str) -> None:
    sample = [abs(x) for x in sample]
    found = describe_sample([sample], bound=1e9, **BUDGET)
    assert found.tolerance == 1e9
    assert re.match(f"bound: .*({why})", found.decided_by), found.decided_by


def test_a_tolerance_is_never_above_the_bound_nor_below_the_largest_error() -> None:
    for bound in (3.5, 4.0, 6.0, 1e3):
        found = describe_sample([[min(x, 3.5) for x in drawn(stats.halfnorm(), 1000)]], bound=bound, **BUDGET)
        assert found.maximum <= found.tolerance <= bound
    assert describe_sample([drawn(stats.expon(), 1000)], bound=8.0, **BUDGET).decided_by.startswith(
        "bound: the tail reach"
    )


def test_more_strata_and_smaller_budgets_ask_for_more() -> None:
    tail, _ = fit_tail(sorted(drawn(stats.expon(), 1000)))
    reached = [
        tail_tolerance(tail, samples=1000, strata=strata, false_alarm=alarm)
        for strata, alarm in ((1, 1e-3), (1, 1e-6), (5, 1e-6), (5, 1e-9))
    ]
    assert reached == sorted(reached)
    # One in five strata makes all that exceed: its own budget is kept.
    small = [[0.1 * x for x in drawn(stats.expon(), 200, seed)] for seed in range(4)]
    found = describe_sample([*small, drawn(stats.expon(), 200, seed=9)], bound=math.inf, false_alarm=1e-4)
    assert float(stats.expon.sf(found.tolerance)) <= 1e-4


def wanted(**changed: Any) -> Wanted:
    given = {"candidates": (), "profile": "quick", "dtypes": ("bf16", "fp32", "fp64"), "device": "cpu", "seeds": 45}
    given["first_seed"] = FIRST_SEED
    return Wanted(**{**given, **changed})


def test_points_that_name_their_checks_are_left_out_and_seeds_are_fresh() -> None:
    blocks = blocks_of(KTO, wanted())
    points = {block.case.point.dims["V"] for block in blocks}
    assert points == {300, 331, 270, 129, 37} and not any(block.case.point.checks for block in blocks)
    assert [block.seeds for block in blocks[:3]] == [20, 20, 5]
    cases = [case for block in blocks for case in block.cases()]
    assert len({case.seed for case in cases}) == len(cases) == 5 * 3 * 45
    audited = {case.seed for case in KTO.cases(profile="full", dtypes=("bf16", "fp32", "fp64"), device="cpu")}
    assert not audited & {case.seed for case in cases}
    assert min(case.offset for case in cases) == FIRST_SEED


def test_candidates_that_round_once_take_the_place_of_published_ones_in_16_bits() -> None:
    op = OPS["rms_norm"]
    assert [right_candidates(op, d) for d in ("bf16", "fp16", "fp32", "fp64")] == [
        ("upcast",),
        ("upcast",),
        ("own", "upcast"),
        ("own",),
    ]
    assert right_candidates(KTO, "bf16") == ("own",)
    words = candidates_in_words(op, wanted())
    assert words == "upcast in bf16, fp32; ktonum.ops.rms_norm:torch_rms_norm in fp32, fp64"
    named = blocks_of(op, wanted(candidates=("torch",)))
    assert {(block.candidate, block.op.candidate) for block in named} == {
        ("torch", op.with_candidate("torch").candidate)
    }
    with pytest.raises(UsageError, match="unknown candidate 'cuda'"):
        blocks_of(op, wanted(candidates=("cuda",)))


def block_of(op: Op, dtype: str = "bf16", seeds: int = 3, candidates: tuple[str, ...] = RIGHT) -> Block:
    return blocks_of(op, wanted(dtypes=(dtype,), seeds=seeds, candidates=candidates))[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_shares_are_what_an_audit_of_the_case_measures(dtype: str) -> None:
    block = block_of(OPS["rms_norm"], dtype)
    series = {f"{s.output}/{s.measure}": s for s in sample_block(block)}
    assert {name.partition("/")[0] for name in series} == {"output", "grad_x", "grad_weight"}
    for i, case in enumerate(block.cases()):
        context = CaseContext(block.op, case)
        audited = {
            m.name: m
            for check in checks_for(block.op, case)
            if check.name in ("forward", "gradients")
            for m in run_check(check_named(block.op, case, check.name), context).measurements
        }
        assert set(audited) >= set(series)
        for name, one in series.items():
            assert one.shares[i] == pytest.approx(audited[name].use)
            assert one.elements[i] == context.expected()[one.output].numel()


def test_outputs_that_may_cancel_are_left_out() -> None:
    op = replace(OPS["rms_norm"], cancelling=("output", "grad_x"))
    assert {s.output for s in sample_block(block_of(op))} == {"grad_weight"}
    assert set(KTO.cancelling) == {
        f"{side}_{what}_sum" for side in ("chosen", "rejected") for what in ("logits", "rewards")
    }


def truncating(**inputs: Any) -> torch.Tensor:
    """RMSNorm whose bf16 store drops bits in place of rounding."""
    exact = OPS["rms_norm"].reference(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    return exact + ((exact.detach().view(torch.int32) & -65536).view(torch.float32) - exact.detach())


def test_a_candidate_beyond_its_bound_is_no_basis(tmp_path: Path) -> None:
    op = replace(OPS["rms_norm"], candidate=lambda **inputs: truncating(**inputs).to(inputs["x"].dtype))
    file = SamplesFile(tmp_path / "samples.jsonl")
    result = BlockWork(block_of(op, candidates=("own",)), file)()
    assert result.verdict is Verdict.FAIL and "output/signed_bias" in result.reason
    right = BlockWork(block_of(OPS["rms_norm"]), file)()
    assert right.verdict is Verdict.INCONCLUSIVE and right.reason == "measured"


def raising(**inputs: Any) -> torch.Tensor:
    raise RuntimeError("no such luck")


def test_a_candidate_that_raises_is_an_error(tmp_path: Path) -> None:
    result = BlockWork(
        block_of(replace(OPS["rms_norm"], candidate=raising), candidates=("own",)), SamplesFile(tmp_path / "s")
    )()
    assert result.verdict is Verdict.ERROR and "no such luck" in result.reason
    assert not (tmp_path / "s").exists()


def test_samples_come_back_and_what_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    first, second = blocks_of(OPS["rms_norm"], wanted(dtypes=("bf16",), seeds=2))[:2]
    series = sample_block(first)
    append_samples(path, first, series)
    assert read_samples(path) == {first.name: (made_with(first), series)}
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert SamplesFile(path).has(first) and not SamplesFile(path).has(second)
    append_samples(path, second, series)
    assert set(read_samples(path)) == {first.name, second.name}
    assert BlockWork(first, SamplesFile(path))().reason == "measured before"


def test_other_code_versions_or_devices_are_measured_again(tmp_path: Path) -> None:
    path, block = tmp_path / "samples.jsonl", block_of(OPS["rms_norm"])
    append_samples(path, block, sample_block(block))
    record = json.loads(path.read_text())
    for name in record["made_with"]:
        other = {**record, "made_with": {**record["made_with"], name: "another"}}
        path.write_text(json.dumps(other) + "\n")
        assert not SamplesFile(path).has(block), name
    elsewhere = replace(block, op=RMS_NORM)
    assert made_with(elsewhere)["code"] != made_with(block)["code"]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"results": []}\n')
    with pytest.raises(UsageError, match=r"report\.json, line 1 holds no samples of ktonum calibrate"):
        SamplesFile(path)


@pytest.fixture(scope="module")
def pools() -> dict[tuple[str, str, str], Any]:
    blocks = blocks_of(OPS["rms_norm"], wanted(dtypes=("fp32",), seeds=60, candidates=RIGHT))
    return pool_samples((block, sample_block(block)) for block in blocks)


@pytest.fixture(scope="module")
def rows(pools: dict[tuple[str, str, str], Any]) -> list[Row]:
    return [row_of(k, p, device="cpu", device_class="cpu", false_alarm=1e-6) for k, p in sorted(pools.items())]


def test_rows_say_what_they_rest_on(rows: list[Row]) -> None:
    assert [row.name for row in rows[:2]] == ["grad_weight/element/fp32/cpu", "grad_weight/relative_norm/fp32/cpu"]
    row = rows[0]
    assert (row.samples, row.strata, row.accumulator, row.stored) == (180, 3, "fp32", "fp32")
    assert row.elements_min == 48 and row.elements_max == 300
    narrowed = [row for row in rows if not row.errors.decided_by.startswith("bound")]
    assert len(narrowed) >= 3 and all(row.tolerance < row.bound for row in narrowed)


def test_strata_of_unlike_scales_are_compared_with_their_own_means() -> None:
    """Together they have a heavy tail, by themselves half a normal distribution's: the widest one keeps its budget."""
    scales = (*[0.3] * 9, 3.0)
    rates = []
    for seed in range(30):
        strata = [[s * x for x in drawn(stats.halfnorm(), 100, 10 * seed + i)] for i, s in enumerate(scales)]
        found = describe_sample(strata, bound=1e9, **BUDGET)
        if found.decided_by == "strata":
            assert found.typical == pytest.approx(3 * math.sqrt(2 / math.pi), rel=0.5)
            rates.append(float(stats.halfnorm.sf(found.tolerance / 3)))
    assert len(rates) >= 20 and float(np.mean(rates)) <= 1e-6


def test_no_element_is_held_to_less_than_one_rounding() -> None:
    """A sample's largest error and bound may be those of elements near their typical size: others are as right."""
    strata = {
        ("p", "own"): Stratum([0.666 + 0.001 * x for x in drawn(stats.uniform(), 500)], [0.678] * 500, [0.9] * 500)
    }
    for sizes, least in (([100] * 500, 1.0), ([1] * 500, 0.678)):
        strata[("p", "own")].elements[:] = sizes
        pool = Pool("fp16", strata)
        row = row_of(("y", "element", "fp16"), pool, device="cpu", device_class="cpu", false_alarm=1e-6)
        assert row.bound == least and row.errors.maximum < row.tolerance <= least
        assert row.tolerance == 1.0 or sizes[0] == 1
    row = row_of(("y", "relative_norm", "fp16"), pool, device="cpu", device_class="cpu", false_alarm=1e-6)
    assert row.bound == 0.678


def test_a_tolerance_below_the_least_says_so() -> None:
    found = describe_sample([drawn(stats.uniform(), 500)], bound=9.0, least=5.0, **BUDGET)
    assert (found.tolerance, found.decided_by) == (5.0, "rounding")
    assert describe_sample([drawn(stats.uniform(), 500)], bound=9.0, least=0.5, **BUDGET).decided_by == "tail"


def table_of(rows: list[Row], provenance: Any = None) -> Table:
    return Table("rms_norm", "by hand", tuple(rows), {} if provenance is None else {"cpu": provenance}, "rms_norm.toml")


REASONED: dict[str, Any] = {"device_class": "cpu", "date": "2026-02-01"}


def tolerances_times(factor: float) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        errors = replace(row.errors, tolerance=factor * row.errors.tolerance)
        return replace(row, errors=errors, shares=replace(row.shares, tolerance=factor * row.shares.tolerance))

    return change


def test_the_same_rows_change_nothing(rows: list[Row]) -> None:
    revision = revise_rows(table_of(rows), rows, reason="", **REASONED)
    assert revision.rows == tuple(rows) and not revision.loosened and not revision.tightened
    assert revise_rows(None, rows, reason="", **REASONED).rows == tuple(rows)


def test_a_row_that_has_grown_looser_than_the_data_need_is_told_with_both_values(rows: list[Row]) -> None:
    old = [tolerances_times(2.0)(row) for row in rows]
    revision = revise_rows(table_of(old), rows, reason="", **REASONED)
    assert revision.rows == tuple(rows) and not revision.loosened and len(revision.tightened) == len(rows)
    assert revision.tightened[0] == f"{rows[0].name}: {old[0].tolerance:g} before, {rows[0].tolerance:g} now"


def test_a_tolerance_that_grows_is_told_and_keeps_its_reason(rows: list[Row]) -> None:
    old = [tolerances_times(0.5)(rows[0]), *rows[1:]]
    revision = revise_rows(table_of(old), rows, reason="a longer sample", **REASONED)
    assert len(revision.loosened) == 1 and rows[0].name in revision.loosened[0]
    assert revision.rows[0].tolerance_before == old[0].tolerance
    assert (revision.rows[0].reason, revision.rows[0].reason_date) == ("a longer sample", "2026-02-01")
    # It stays until the row is looser again, and other rows have none.
    again = revise_rows(table_of(list(revision.rows)), rows, reason="another", **REASONED)
    assert again.rows == revision.rows and not any(row.reason for row in again.rows[1:])


def test_a_share_that_grows_or_a_row_that_is_gone_is_loosening_too(rows: list[Row]) -> None:
    tighter = replace(rows[0], shares=replace(rows[0].shares, tolerance=rows[0].shares.tolerance / 2))
    assert "of the bound before" in revise_rows(table_of([tighter]), rows[:1], reason="", **REASONED).loosened[0]
    (gone,) = revise_rows(table_of(rows[:2]), rows[:1], reason="", **REASONED).loosened
    assert "not measured now" in gone and rows[1].name in gone
    other = replace(rows[1], device_class="sm_90")
    assert not revise_rows(table_of([other]), rows[:1], reason="", **REASONED).loosened


def test_fresh_errors_are_held_against_rows(rows: list[Row], pools: dict[tuple[str, str, str], Any]) -> None:
    from test_tables import PROVENANCE

    table = table_of(rows, replace(PROVENANCE, device="a CPU"))
    held = hold_against_rows(pools, table, device_class="cpu", device="another CPU")
    assert all(one.within and one.measured for one in held)
    assert all("carried over: measured on a CPU, another device of the class cpu" in one.said for one in held)
    halved = table_of([tolerances_times(0.3)(row) for row in rows], replace(PROVENANCE, device="a CPU"))
    narrowed = [
        r.name for r in rows if not r.errors.decided_by.startswith("bound") and 0.3 * r.tolerance < r.errors.maximum
    ]
    beyond = [one for one in hold_against_rows(pools, halved, device_class="cpu", device="a CPU") if not one.within]
    assert set(narrowed) <= {one.name for one in beyond} and narrowed
    assert "beyond" in beyond[0].said and "carried over" not in beyond[0].said
    unmeasured = hold_against_rows(pools, table, device_class="sm_90", device="NVIDIA H200")
    assert not any(one.measured for one in unmeasured)
    assert all(
        "within the derived bound" in one.said and "no row for device class 'sm_90'" in one.said for one in unmeasured
    )
