"""Writes an audit as one HTML file that needs no other files."""

from __future__ import annotations

import importlib
from importlib import resources
from pathlib import Path

from ktonum.errors import UsageError
from ktonum.report.power_tables import blind_spots, flagged_from, power_rows, weakest_power
from ktonum.report.sentences import bound_words, format_measured, measured, reason_words
from ktonum.report.summary import ending, findings, inconclusive_reasons, matrix, standards
from ktonum.results import CheckResult, Report

__all__ = ["write_html"]


def write_html(report: Report, path: str | Path, *, planned: int | None = None, strict: bool = False) -> None:
    """Write the report as a page.

    Args:
        report: The results.
        path: The file to write.
        planned: The number of expected results; None for the number of results in the report.
        strict: Whether INCONCLUSIVE fails.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        jinja2 = importlib.import_module("jinja2")
    except ImportError as error:
        raise UsageError("an HTML report needs jinja2, which is not installed: pip install 'ktonum[report]'") from error
    source = resources.files("ktonum.report").joinpath("audit.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    results = report.results
    ended = ending(report, planned=len(results) if planned is None else planned, strict=strict)
    page = environment.from_string(source).render(
        sentence=ended.sentence,
        passed=ended.passed,
        environment=report.environment,
        matrix=matrix(results),
        standards=standards(results),
        findings=findings(results),
        inconclusive=inconclusive_reasons(results),
        power=[{"check": r.check, "defect": r.defect, "cells": dict(r.cells)} for r in power_rows(results)],
        blind=[(spot.check, spot.words) for spot in blind_spots(results)],
        rows=[_row(r) for r in results],
    )
    Path(path).write_text(page, encoding="utf-8")


def _row(result: CheckResult) -> dict[str, object]:
    return {
        "verdict": "vacuous" if result.vacuous else result.verdict.value,
        "check": result.check,
        "dtype": result.parts.dtype,
        "name": result.case,
        "measured": measured(result),
        "power": weakest_power(result),
        "meets": ", ".join(result.meets),
        "reason": reason_words(result),
        "details": result.details,
        "measurements": [
            (format_measured(m), list(m.where) if m.where else "", bound_words(m.bound_source), m.within)
            for m in result.measurements
        ],
        "places": [(p.subject, p.where, p.looks_like) for p in result.localisations],
        "powers": [(p.defect, flagged_from(p)) for p in result.power],
    }
