"""A file of schema 1 reads as if it had been written today.

`report_schema_1.json` is an audit of two small ops with planted faults, under `eager`, by the last version that wrote
schema 1. Of its results some were kept, and of these the first measurements and planted defects.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktonum.gate.decision import hold_against
from ktonum.gate.report_reading import read_report
from ktonum.report.sentences import bound_words, reason_words
from ktonum.results import BoundKind, BoundSource, Cause, CheckResult, Measurement, Report, Verdict
from ktonum.results.upgrade_schema_1 import upgraded_result

FILE = Path(__file__).with_name("report_schema_1.json")
OLD = json.loads(FILE.read_text(encoding="utf-8"))
REPORT = Report.from_json(FILE)


def of_check(check: str, dtype: str = "fp16") -> CheckResult:
    (found,) = (r for r in REPORT.results if (r.check, r.parts.dtype) == (check, dtype))
    return found


def test_nothing_is_lost() -> None:
    assert len(REPORT.results) == len(OLD["results"]) > 10 and REPORT.environment == OLD["environment"]
    for new, old in zip(REPORT.results, OLD["results"], strict=True):
        assert (new.case, new.check, new.verdict) == (old["case"], old["check"], old["verdict"])
        assert [(m.value, m.bound, m.unit) for m in new.measurements] == [
            (float(m["value"]), float(m["bound"]), m["unit"]) for m in old["measurements"]
        ]
        assert [p.size for p in new.power] == [p["size"] for p in old["power"]]
        assert new.parts.name == new.case


def test_names_come_apart() -> None:
    where = {(m.tensor, m.context, m.measure, m.draws, m.remark) for r in REPORT.results for m in r.measurements}
    assert where >= {
        ("grad_x", "", "relative_norm", None, ""),
        ("upstream_loss", "at expanded ones", "differing_elements", None, ""),
        ("loss", "requiring none", "element", None, ""),
        ("grad_x", "of a second backward", "element", None, ""),
        ("y", "under autocast", "error", 5, ""),
        ("grad_x", "", "bias", 8, ""),
        ("grad_x", "with x zero", "relative_norm", None, ""),
        ("grad_x", "at V = 2048, positive", "relative_norm", None, ""),
        ("loss", "at N = 2048, mean zero", "relative_error", None, "hidden by rounding to fp16"),
        ("grad_weight", "with NaN in x", "nonfinite_places", None, ""),
        ("", "", "structure_differences", None, ""),
    }
    assert of_check("gradients").worst is not None and of_check("gradients").measurements[0].where == (0, 3)
    assert of_check("forward").measurements[0].where == (), "a number's place, which schema 1 had as []"
    defects = {(p.tensor, p.context, p.kind, p.unit) for r in REPORT.results for p in r.power}
    assert defects >= {
        ("x", "", "one row", "scaled by 1 + size"),
        ("loss", "requiring none", "halved", ""),
        ("", "", "another shape", ""),
    }
    places = {(p.tensor, p.context) for r in REPORT.results for p in r.localisations}
    assert places >= {("grad_x", ""), ("grad_x", "at V = 2048, positive"), ("grad_weight", "under autocast")}


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("rounding-error analysis, precise", BoundSource(BoundKind.DERIVED, "precise")),
        ("4 × the error of the reference in float32", BoundSource(BoundKind.MEASURED, scale=4.0, dtype="fp32")),
        (
            "2 × the error of the reference under autocast to bf16, and the F distribution",
            BoundSource(BoundKind.MEASURED, scale=2.0, dtype="bf16", autocast=True),
        ),
        (
            "rounding-error analysis, eager, or 4 × the error of the reference in fp16",
            BoundSource(BoundKind.LARGER, "eager", 4.0, "fp16"),
        ),
        (
            "4 × the error of the reference in bf16, or 4 × the error of the reference in bf16",
            BoundSource(BoundKind.MEASURED, scale=4.0, dtype="bf16"),
        ),
        ("the reference in fp16 overflows", BoundSource(BoundKind.MEASURED, scale=4.0, dtype="fp16")),
        (
            "error bar of the extrapolated central difference, times a confidence factor of 2",
            BoundSource(BoundKind.ERROR_BAR, scale=2.0),
        ),
        ("declared by the op", BoundSource(BoundKind.DECLARED)),
        ("told, not decided", BoundSource(BoundKind.NONE)),
        ("law 'padding'", BoundSource(BoundKind.EXACT, text="law 'padding'")),
    ],
)
def test_sources_of_bounds_come_apart(text: str, source: BoundSource) -> None:
    assert _upgraded(measurements=[_measurement(bound_source=text)]).measurements[0].bound_source == source


def test_the_gate_knows_which_bounds_follow_the_reference() -> None:
    sources = {m.bound_source for r in REPORT.results for m in r.measurements if m.bound_source.follows_reference}
    assert {bound_words(s) for s in sources} == {
        "4 × the error of the reference under autocast to bf16",
        "2 × the error of the reference under autocast to bf16",
        "the larger one of rounding-error analysis, eager, and 4 × the error of the reference in fp16",
    }


@pytest.mark.parametrize(
    ("verdict", "reason", "cause", "own"),
    [
        ("ERROR", "the candidate raised ValueError: no", Cause.CANDIDATE_WRONG, "raised ValueError: no"),
        ("ERROR", "the candidate refused the case: N = 9", Cause.CANDIDATE_REFUSED, "N = 9"),
        ("ERROR", "IndexError: in the check", Cause.CHECK_RAISED, "IndexError: in the check"),
        (
            "ERROR",
            "hung: no verdict within the time limit of 4 s",
            Cause.HUNG,
            "no verdict within the time limit of 4 s",
        ),
        ("ERROR", "the process died while the candidate ran", Cause.DIED, ""),
        ("ERROR", "the process died while the candidate ran: Fatal", Cause.DIED, "Fatal"),
        ("ERROR", "not run: the session ended before", Cause.NOT_RUN, "the session ended before"),
        (
            "ERROR",
            "the CUDA context was lost while the candidate ran, after results had been read",
            Cause.CUDA_LOST,
            "",
        ),
        ("INCONCLUSIVE", "the candidate cannot run this case: no masks", Cause.CANNOT_RUN, "no masks"),
        ("INCONCLUSIVE", "out of device memory while checking: CUDA", Cause.OUT_OF_MEMORY, "CUDA"),
        ("INCONCLUSIVE", "the candidate has nothing to measure here", Cause.NOTHING_MEASURED, ""),
        (
            "INCONCLUSIVE",
            "the reference has no gradients here",
            Cause.CANNOT_TELL,
            "the reference has no gradients here",
        ),
        ("PASS", "vacuous: no planted defect, up to 400 %, was flagged", None, ""),
        ("PASS", "every gradient agrees", None, "every gradient agrees"),
        (
            "FAIL",
            "the candidate returned 'y' of shape (1,)",
            Cause.BEYOND_BOUND,
            "the candidate returned 'y' of shape (1,)",
        ),
    ],
)
def test_reasons_come_apart(verdict: str, reason: str, cause: Cause | None, own: str) -> None:
    found = _upgraded(verdict=verdict, reason=reason)
    assert (found.cause, found.reason) == (cause, own)


def test_a_reason_that_only_repeated_the_worst_measurement_is_made_again() -> None:
    failed = of_check("gradients")
    assert failed.verdict is Verdict.FAIL and failed.reason == "" and failed.cause is Cause.BEYOND_BOUND
    assert reason_words(failed).startswith("grad_x is wrong: grad_x/relative_norm = 2, ")


def test_a_case_of_another_name_has_no_parts() -> None:
    assert _upgraded(case="something else").parts.op == ""


def test_the_gate_holds_an_audit_against_a_baseline_of_schema_1(tmp_path: Path) -> None:
    REPORT.to_json(tmp_path / "current.json")
    found = hold_against(
        baseline=read_report(FILE, "--baseline"), current=read_report(tmp_path / "current.json", "CURRENT")
    )
    assert found.passed and found.compared == len(REPORT.results) and not found.changed and found.errors > 20
    assert not found.new and not found.vanished


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    for damaged in (
        {"results": [{**OLD["results"][0], "measurements": [None]}]},
        {"results": [{**OLD["results"][0], "measurements": [{"name": 3}]}]},
        {"results": [3]},
        {"results": None},
    ):
        (tmp_path / "damaged.json").write_text(json.dumps({**OLD, **damaged}), encoding="utf-8")
        with pytest.raises(ValueError, match="not a ktonum report that can be read"):
            Report.from_json(tmp_path / "damaged.json")


def _upgraded(**changes: Any) -> CheckResult:
    plain = {"case": "op[N=1]-fp32-cpu", "check": "forward", "verdict": "PASS", "reason": ""}
    return CheckResult.from_record(upgraded_result(plain | changes))


def _measurement(**changes: Any) -> dict[str, Any]:
    return {"name": "y/element", "value": 0.5, "bound": 1.0, "unit": "1", "bound_source": "", "where": ""} | changes


def test_today_s_names_are_read_alike() -> None:
    """A record of an audit may mix them, see benchmarks/record_verdicts.py."""
    for name in ("y with NaN in x/nonfinite_places", "y at H = 2048, positive/element", "y/bias over 8 draws"):
        m = _upgraded(measurements=[_measurement(name=name)]).measurements[0]
        assert isinstance(m, Measurement) and m.name == name
