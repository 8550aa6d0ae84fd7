"""Settings are built once and are the same in every worker. The plan is the same in every process."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ktonum.auditing.audit_settings import AuditSettings, SessionSettings
from ktonum.auditing.plan import KeptContext
from ktonum.calibrate.calibration_settings import CalibrationSettings
from ktonum.results import CheckResult, Report, Verdict
from subjects.small_ops import RMS_NORM
from support.command_line import run
from support.throwaway_ops import write_ops

# A value for each type of field that differs from all defaults.
OTHER: dict[str, Any] = {
    "str": "other",
    "str | None": "other",
    "tuple[str, ...]": ("one", "two"),
    "int": 7,
    "float": 1.5,
}


@pytest.mark.parametrize("kind", [AuditSettings, CalibrationSettings])
def test_settings_arrive_as_they_were_sent(kind: type[SessionSettings[Any]]) -> None:
    given = {f.name: OTHER[f.type] if f.type in OTHER else not f.default for f in fields(kind)}
    assert {type(v) for v in given.values()} >= {str, tuple, bool, float}
    settings = kind(**given)
    arrived = SessionSettings.from_bytes(settings.to_bytes())
    assert type(arrived) is kind and arrived == settings
    with pytest.raises(TypeError, match="expected session settings, got dict"):
        SessionSettings.from_bytes(pickle.dumps(given))


_OTHER_POINTS = """
if "PYTEST_XDIST_WORKER" in os.environ:
    dims = [{"N": 4, "M": 33}, {"N": 2, "M": 1}]
    right = Op(name="right", candidate=right_, reference=reference, sample=sample, dims=dims)
"""


def test_a_worker_with_another_plan_ends_the_audit_and_is_named(tmp_path: Path) -> None:
    file = write_ops(tmp_path)
    file.write_text(file.read_text(encoding="utf-8") + _OTHER_POINTS, encoding="utf-8")
    common = ("--device", "cpu", "--dtype", "fp32", "--only", "forward", "--json", "report.json")
    status, out, err = run(tmp_path, "audit", "throwaway.py:right", *common, "-n", "1")
    assert status == 1, err
    assert "worker gw0 planned right[N=2,M=1]-fp32-cpu::forward, which this process did not" in " ".join(out.split())
    report = Report.from_json(tmp_path / "report.json")
    assert [r.verdict for r in report.results] == [Verdict.ERROR] * 3


def test_the_checks_of_a_case_share_its_context_and_no_other_is_kept() -> None:
    kept = KeptContext()
    first, second = RMS_NORM.cases(profile="quick", dtypes=["fp32", "fp64"], device="cpu")[:2]
    assert first.name != second.name
    context = kept.of(RMS_NORM, first)
    assert kept.of(RMS_NORM, first) is context
    assert kept.of(RMS_NORM, second).case is second
    assert kept.of(RMS_NORM, first) is not context


def test_inconclusive_fails_an_item_when_strict() -> None:
    result = CheckResult("case", "check", Verdict.INCONCLUSIVE)
    assert not AuditSettings(targets=()).fails(result) and AuditSettings(targets=(), strict=True).fails(result)
    assert not CalibrationSettings(targets=(), samples="s").fails(result)
    assert AuditSettings(targets=()).fails(CheckResult("case", "check", Verdict.FAIL))


def test_a_calibration_draws_as_many_seeds_as_suit_the_device() -> None:
    settings = CalibrationSettings(targets=(), samples="s", dtypes="bf16")
    assert [settings.wanted(device).seeds for device in ("cpu", "cuda")] == [36, 200]
    assert CalibrationSettings(targets=(), samples="s", seeds=3).wanted("cpu").seeds == 3
    assert settings.wanted("cpu").dtypes == ("bf16",)
