"""Results as JSON: they come back equal, what is damaged is named, and the page lists the very fields."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktonum.declare.cases import Case, Point
from ktonum.errors import InputError
from ktonum.results import (
    SCHEMA,
    BoundKind,
    BoundSource,
    CaseParts,
    Cause,
    CheckResult,
    Localisation,
    Measurement,
    Power,
    Report,
    Verdict,
)
from support.repository import ROOT

CASE = Case("kto", Point({"B": 3, "T": 65}, {"beta": 0.3, "kl": True, "loss_type": "apo"}, "peaked"), "bf16", "cpu", 2)
EVERYTHING = CheckResult(
    CASE.name,
    "upstream",
    Verdict.FAIL,
    (
        Measurement(
            "grad_x",
            "relative_norm",
            math.inf,
            0.5,
            "ulp",
            BoundSource(BoundKind.LARGER, "eager", 4.0, "bf16", True, "words"),
            (3, 17),
            0.25,
            "at expanded ones",
            8,
            "blocked in fp32",
        ),
        Measurement("loss", "element", 0.0, math.inf),
    ),
    (Power("grad_x", "scaling", "by 1 + size", 1e-3, "at expanded ones"), Power("", "another shape", "", None)),
    "own words",
    "eager",
    ("eager",),
    1.5,
    "several\nlines",
    (Localisation("grad_x", "row 3", "sign flipped", "at expanded ones"),),
    Cause.BEYOND_BOUND,
    CASE.parts,
)


def test_results_come_back_equal(tmp_path: Path) -> None:
    report = Report((EVERYTHING, CheckResult("c", "d", Verdict.PASS)), {"torch": "2"})
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["schema"] == SCHEMA == "ktonum-report/2"


def test_names_are_made_of_the_fields() -> None:
    first, second = EVERYTHING.measurements
    assert first.name == "grad_x at expanded ones/relative_norm over 8 draws" and second.name == "loss/element"
    assert Measurement("", "peak_memory", 1.0, 2.0).name == "peak_memory"
    assert [p.defect for p in EVERYTHING.power] == ["grad_x at expanded ones: scaling, by 1 + size", "another shape"]
    assert CASE.parts.name == CASE.name == "kto[B=3,T=65,beta=0.3,kl=True,loss_type=apo]-bf16-cpu-peaked+2"


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    record = EVERYTHING.to_record()
    change(record)
    return record


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (changed(lambda r: r.pop("check")), "lacks check: its fields are case, check, verdict"),
        (changed(lambda r: r.update(colour="red")), "has an unknown colour"),
        (changed(lambda r: r.update(verdict="MAYBE")), "verdict is 'MAYBE': expected 'PASS', 'FAIL', 'INCONCLUSIVE'"),
        (changed(lambda r: r.update(measurements={})), "measurements is {}: expected a list"),
        (changed(lambda r: r["measurements"][0].update(value="large")), "[0].value is 'large': expected a number"),
        (changed(lambda r: r["measurements"][0].update(value=True)), "[0].value is True: expected a number"),
        (changed(lambda r: r["measurements"][0].update(where=[1.5])), "[0].where[0] is 1.5: expected an integer"),
        (changed(lambda r: r["measurements"][0].update(bound_source="analysis")), "'analysis': expected an object"),
        (
            changed(lambda r: r["measurements"][0]["bound_source"].update(kind="guessed")),
            "'guessed': expected 'derived'",
        ),
        (changed(lambda r: r["parts"].update(dims=[3])), "parts.dims is [3]: expected an object"),
        (changed(lambda r: r["power"][1].update(size="any")), "power[1].size is 'any': expected a number"),
    ],
)
def test_what_is_damaged_is_named_with_what_is_accepted(record: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        CheckResult.from_record(record)


@pytest.mark.parametrize("schema", ["ktonum-report/3", "ktonum-gate/1", None])
def test_an_unknown_schema_is_refused_with_what_was_found_what_is_accepted_and_what_to_do(schema: str | None) -> None:
    with pytest.raises(InputError) as caught:
        Report.from_document({"schema": schema, "results": [], "environment": {}})
    for words in (repr(schema), "'ktonum-report/2' or 'ktonum-report/1'", "ktonum audit OP --json", "upgrade ktonum"):
        assert words in str(caught.value)


PAGE = (ROOT / "docs" / "report_schema.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def listed(heading: str, head: str = "| field | default |") -> list[str]:
    """The first column of the table with this head below a heading."""
    rows = section(heading).partition(head)[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)


@pytest.mark.parametrize(
    "kind", [Report, CheckResult, CaseParts, Measurement, BoundSource, Power, Localisation], ids=lambda k: k.__name__
)
def test_the_page_lists_the_fields(kind: type) -> None:
    assert listed(kind.__name__) == [field.name for field in dataclasses.fields(kind)]
    # In the table's second column, those that may be missing have a default.
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        assert (f"\n| `{field.name}` | | " in section(kind.__name__)) is required, field.name


def test_the_page_lists_causes_and_kinds_of_bounds() -> None:
    assert listed("CheckResult", "| `cause` | verdict |") == [cause.value for cause in Cause]
    assert listed("BoundSource", "| `kind` | meaning |") == [kind.value for kind in BoundKind]
