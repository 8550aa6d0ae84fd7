"""`ktonum gate` on the command line: its output, its refusals and its JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktonum.cli import command_line as cli
from ktonum.errors import UsageError
from ktonum.gate.decision import hold_against
from ktonum.gate.decision_report import SCHEMA, to_record
from ktonum.gate.report_reading import read_report
from ktonum.results import CaseParts, Report
from support.gate_reports import BASELINE, MODEL, OTHER_VERSIONS, edited, failing, one_case, scaled, times
from support.simulated_audits import ENVIRONMENT


def command(tmp_path: Path, current: Report, *options: str, baseline: Report = BASELINE) -> tuple[int, Path]:
    """The exit status of the command, and the path of its JSON."""
    current.to_json(tmp_path / "current.json")
    baseline.to_json(tmp_path / "baseline.json")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gate", str(tmp_path / "current.json"), "--baseline", str(tmp_path / "baseline.json"), *options])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, tmp_path / "gate.json"


def test_a_log_has_ten_lines_and_the_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = replace(MODEL, error=times(1.5)).report(1, OTHER_VERSIONS)
    current = edited(worse, one_case(lambda r: failing(r, value=50)))
    status, file = command(tmp_path, current, "--json", str(tmp_path / "gate.json"))
    assert status == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 11 and all(len(line) <= 120 for line in out.splitlines()[:-1]), out
    for part in (
        "FAILS",
        "bf16 N=3: too large",
        "kernel worse",
        "GREW",
        "× 1.",
        "torch 2.11.0 → 2.12.0",
        "The gate fails: 1 new failure",
    ):
        assert part in out, out
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["schema"] == SCHEMA and document["passed"] is False
    assert len(document["growths"]) > 3 and document["failures"][0]["attribution"] == "kernel worse"
    assert Counter(g["attribution"] for g in document["growths"]).keys() == {"kernel worse"}


def test_a_gate_that_passes_says_so_in_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, BASELINE)[0] == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 and "none of" in out and "The gate passes" in out


def document(**changes: object) -> str:
    result = BASELINE.results[0].to_record()
    return json.dumps({"schema": "ktonum-report/2", "environment": {}, "results": [result], **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("cannot be read", "ktonum audit OP --json FILE")),
        ("", ("is not JSON", "ktonum audit OP --json FILE")),
        ("[1, 2", ("is not JSON",)),
        ("[]", ("the schema is None", "'ktonum-report/2' or 'ktonum-report/1' is accepted")),
        ('{"schema": "ktonum-gate/1"}', ("the schema is 'ktonum-gate/1'", "ktonum audit OP --json FILE")),
        (document(schema="ktonum-report/3"), ("'ktonum-report/3'", "'ktonum-report/2'", "upgrade ktonum")),
        (document(results=None), ("report.results is None", "expected a list")),
        (document(results=[]), ("no results", "audit again")),
        (document(results=[{"case": "x"}]), ("results[0] lacks check, verdict",)),
        (document(results=[{**BASELINE.results[0].to_record(), "verdict": "MAYBE"}]), ("verdict is 'MAYBE'", "'PASS'")),
        (document(results=[BASELINE.results[0].to_record()] * 2), ("2 times",)),
        (
            document(results=[replace(BASELINE.results[0], parts=CaseParts("rope")).to_record()]),
            ("audits rope", "model", "of the same op"),
        ),
        (
            document(results=[replace(BASELINE.results[0], standard="eager").to_record()]),
            ("held to eager", "--baseline to precise", "--standard"),
        ),
    ],
)
def test_files_that_cannot_be_compared_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: tuple[str, ...]
) -> None:
    BASELINE.to_json(tmp_path / "baseline.json")
    current = tmp_path / "current.json"
    if text is not None:
        current.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gate", str(current), "--baseline", str(tmp_path / "baseline.json")])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert all(word in line for word in words), line
    assert "CURRENT" in line


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(p for key, item in inner for p in places(item, (*path, key)))]


def test_any_single_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Every other exception than `UsageError` is a bug. A missing measure or remark is not damage."""
    few = Report((scaled(BASELINE.results[0], value=50), BASELINE.results[1]), ENVIRONMENT)
    few.to_json(tmp_path / "sound.json")
    sound = read_report(tmp_path / "sound.json", "CURRENT")
    text, refused = (tmp_path / "sound.json").read_text(encoding="utf-8"), 0
    paths = [p for p in places(json.loads(text)) if p[:2] != ("results", 1)]
    for path in paths:
        for junk in (None, 3, -1.5, "x", [], {}, [[1]], {"a": 1}):
            broken = json.loads(text)
            place = broken
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
            (tmp_path / "broken.json").write_text(json.dumps(broken), encoding="utf-8")
            try:
                found = read_report(tmp_path / "broken.json", "CURRENT")
                to_record(hold_against(baseline=sound, current=found))
                to_record(hold_against(baseline=found, current=sound))
            except UsageError:
                refused += 1
    assert refused > len(paths)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--false-alarm", "0"), "use a number between 0 and 1"),
        (("--json", "no/such/folder/g.json"), "create it first"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert command(tmp_path, BASELINE, *options)[0] == 2
    assert words in capsys.readouterr().err


def test_a_gate_without_a_baseline_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gate", "current.json"])
    assert stopped.value.code == 2 and "--baseline" in capsys.readouterr().err
