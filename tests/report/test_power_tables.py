"""Which planted defects a report lists as flagged and as missed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ktonum.report.html import write_html
from ktonum.report.power_tables import blind_spots, flagged_from, power_rows, weakest_power
from ktonum.results import (
    CheckResult,
    Power,
    Report,
)
from support.report_results import FAIL, result, text_of


def _of_kinds(*powers: Power) -> CheckResult:
    return replace(result(), power=powers)


def test_defects_that_would_have_passed_are_listed_by_check_and_kind() -> None:
    results = (
        _of_kinds(
            Power("loss", "truncated", "", None), Power("grad_x", "one row zero", "", 1.0, "at V = 2048, positive")
        ),
        _of_kinds(
            Power("loss", "truncated", "", None), Power("grad_x", "one row zero", "", None, "at V = 2048, positive")
        ),
        _of_kinds(Power("loss", "truncated", "", 1.0), Power("loss", "scaling", "by 1 + size", 1e-3)),
        replace(FAIL, power=(Power("loss", "halved", "", None),)),
    )
    (spots,) = blind_spots(results)
    assert spots.check == "forward" and spots.words == "truncated 2 of 3, one row zero 1 of 2"
    assert "truncated 2 of 3" in text_of(*results)
    assert {row.defect for row in power_rows(results)} == {"scaling"}, "kinds without a size have no smallest one"


@pytest.mark.parametrize(
    ("powers", "weakest"),
    [
        (
            (
                Power("x", "scaling", "by 1 + size", 1e-3),
                Power("y", "scaling", "by 1 + size", 1e-2),
                Power("y", "one row zero", "", 1.0),
            ),
            "scaling 1e-02",
        ),
        ((Power("x", "one element", "off by size × one", 2e-3), Power("x", "halved", "", 1.0)), "one element 2e-03"),
        ((Power("", "another shape", "", 1.0),), "another shape"),
        ((Power("x", "halved", "", None),), ""),
    ],
)
def test_the_weakest_power_is_that_of_scalings_if_there_are_any(powers: tuple[Power, ...], weakest: str) -> None:
    assert weakest_power(_of_kinds(*powers)) == weakest


def test_a_defect_without_a_size_is_flagged_or_not() -> None:
    powers = (Power("x", "halved", "", 1.0), Power("x", "halved", "", None), Power("x", "scaling", "by 1 + size", 0.25))
    assert [flagged_from(p) for p in powers] == ["flagged", "not flagged", "2.5e-01"]


def test_the_page_has_every_planted_defect(tmp_path: Path) -> None:
    passed = _of_kinds(
        Power("x", "halved", "", 1.0),
        Power("x", "one row zero", "", None),
        Power("x", "one row", "scaled by 1 + size", 0.25),
    )
    write_html(Report((passed,)), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>forward</td><td>one row zero 1 of 1</td>" in page
    assert '<td>x: halved</td><td class="number">flagged</td>' in page
    assert "<td>forward</td><td>one row</td>" in page
