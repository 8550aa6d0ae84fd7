"""Calibration: what is measured, and what rows say of it; tolerances never become looser without a message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktonum.auditing.judge import check_named, run_check
from ktonum.calibrate.against_table import hold_against_rows
from ktonum.calibrate.block_errors import sample_block
from ktonum.calibrate.calibration_settings import FIRST_SEED
from ktonum.calibrate.planned_block import PlannedBlock, SamplesFile
from ktonum.calibrate.samples_file import append_samples, made_with, read_samples
from ktonum.calibrate.seed_blocks import Block, Wanted, blocks_of, candidates_in_words, right_candidates
from ktonum.calibrate.table_revision import revise_rows
from ktonum.calibrate.table_rows import Pool, Stratum, pool_samples, row_of
from ktonum.case.context import CaseContext
from ktonum.checks import checks_for
from ktonum.declare.op import Op
from ktonum.errors import UsageError
from ktonum.kernels.audit.kto_op import OP as KTO
from ktonum.results import Verdict
from ktonum.tolerances.tables import Row, Table
from subjects.op_defects import OPS
from subjects.small_ops import RMS_NORM

RIGHT = ("upcast",)


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
    assert words == "upcast in bf16, fp32; ktonum.ready_ops.rms_norm:torch_rms_norm in fp32, fp64"
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
    """RMSNorm whose bf16 store drops bits instead of rounding."""
    exact = OPS["rms_norm"].reference(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    return exact + ((exact.detach().view(torch.int32) & -65536).view(torch.float32) - exact.detach())


def test_a_candidate_beyond_its_bound_is_no_basis(tmp_path: Path) -> None:
    op = replace(OPS["rms_norm"], candidate=lambda **inputs: truncating(**inputs).to(inputs["x"].dtype))
    file = SamplesFile(tmp_path / "samples.jsonl")
    result = PlannedBlock.of(block_of(op, candidates=("own",)), file).run()
    assert result.verdict is Verdict.FAIL and "output/signed_bias" in result.reason
    right = PlannedBlock.of(block_of(OPS["rms_norm"]), file).run()
    assert right.verdict is Verdict.INCONCLUSIVE and right.reason == "measured"


def raising(**inputs: Any) -> torch.Tensor:
    raise RuntimeError("no such luck")


def test_a_candidate_that_raises_is_an_error(tmp_path: Path) -> None:
    block = block_of(replace(OPS["rms_norm"], candidate=raising), candidates=("own",))
    result = PlannedBlock.of(block, SamplesFile(tmp_path / "s")).run()
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
    assert PlannedBlock.of(first, SamplesFile(path)).run().reason == "measured before"


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


def test_no_element_is_held_to_less_than_one_rounding() -> None:
    """If all elements of a sample are near their typical size, larger elements have larger errors and are right too."""
    strata = {("p", "own"): Stratum([0.666 + i * 2e-6 for i in range(500)], [0.678] * 500, [0.9] * 500)}
    for sizes, least in (([100] * 500, 1.0), ([1] * 500, 0.678)):
        strata[("p", "own")].elements[:] = sizes
        pool = Pool("fp16", strata)
        row = row_of(("y", "element", "fp16"), pool, device="cpu", device_class="cpu", false_alarm=1e-6)
        assert row.bound == least and row.errors.maximum < row.tolerance <= least
        assert row.tolerance == 1.0 or sizes[0] == 1
    row = row_of(("y", "relative_norm", "fp16"), pool, device="cpu", device_class="cpu", false_alarm=1e-6)
    assert row.bound == 0.678


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
    # The reason stays until the row is loosened again. Other rows have none.
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
    from support.toy_tables import PROVENANCE

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
