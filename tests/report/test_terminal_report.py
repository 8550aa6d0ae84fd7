"""Reports for people: verdict lines, the summary, the HTML page, on terminals of several kinds."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ktonum.report.failure_text import describe_result
from ktonum.report.html import write_html
from ktonum.report.power_tables import power_rows
from ktonum.report.summary import findings, matrix, standards
from ktonum.report.terminal import AuditView, verdict_line
from ktonum.results import (
    CheckResult,
    Localisation,
    Report,
    Verdict,
)
from support.report_results import FAIL, MANY, result, text_of


def test_a_failure_says_where_it_is_and_what_it_looks_like() -> None:
    places = (Localisation("grad_weight", "row 3", "sign flipped"), Localisation("loss", "not found: planted", ""))
    failure = replace(FAIL, localisations=places)
    text = text_of(failure)
    for line in (
        "where grad_weight is wrong: row 3",
        "grad_weight looks like: sign flipped",
        "where loss is wrong: not found: planted",
    ):
        assert line in text and line in describe_result(failure)
    assert "loss looks like" not in text


def test_the_page_says_where_it_is_and_what_it_looks_like(tmp_path: Path) -> None:
    failure = replace(FAIL, localisations=(Localisation("grad_weight", "row 3", "scaled by <2>"),))
    write_html(Report((failure,)), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>grad_weight</td><td>row 3</td><td>scaled by &lt;2&gt;</td>" in page


def test_a_verdict_is_one_line_with_its_measurement_and_power() -> None:
    line = verdict_line(result()).plain
    assert line.split() == [
        "PASS", "forward", "bf16", "loss/relative_norm", "=", "0.25", "/", "0.5", "flags", "scaling", "3e-05",
        "kto[B=3,T=65]",
    ]  # fmt: skip
    line = verdict_line(FAIL).plain
    assert line.startswith("FAIL ") and "= 325 / 0.5 at [3, 17]" in line and "meets eager" in line
    line = verdict_line(result(Verdict.ERROR, reason="the candidate raised\nand more")).plain
    assert "the candidate raised" in line and "\n" not in line
    assert verdict_line(result(power=None)).plain.startswith("vacuous ")


def test_a_log_has_whole_lines_and_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=40, highlight=False)
    with AuditView(console, 2) as view:
        view.show(result(dims=MANY))
        view.show(FAIL)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert "\x1b" not in console.file.getvalue()
    assert all(f"B{i}=3" in lines[0] for i in range(30))


def test_a_terminal_has_a_bar_and_no_line_wider_than_itself() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None, highlight=False)
    with AuditView(console, 1) as view:
        view.show(result(dims=MANY))
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "1/1" in written
    verdicts = [line for line in written.replace("\r", "\n").splitlines() if "PASS" in line]
    assert len(verdicts) == 1 and "…" in verdicts[0] and "B29=3" not in verdicts[0]


def test_the_summary_of_a_pass_says_what_would_have_been_caught() -> None:
    text = text_of(result(), result(dtype="fp32", power=2e-7), result(dtype="fp32", dims={"B": 4}, power=4e-7))
    assert "The audit passes: 3 passed. 1.2 s." in text
    assert "Standard precise (it decides): met in bf16, fp32." in text
    row = next(line for line in text.splitlines() if line.startswith("forward") and "scaling" in line)
    assert row.split() == ["forward", "scaling", "3e-05", "3e-07", "(4e-07)"]
    assert "What is wrong" not in text


def test_a_failure_is_reported_with_its_worst_case_and_a_command_to_run_it_again() -> None:
    text = text_of(
        result(dims={"B": 1}, dtype="fp32"),
        FAIL,
        result(Verdict.FAIL, dims={"B": 9}, value=1.5, meets=()),
        result(Verdict.FAIL, dtype="fp16", value=2.0, meets=()),
        width=400,
    )
    assert "forward fails on 3 of 4 cases" in text
    first = text.splitlines().index("      bf16: 2 of 2 cases fail, the worst is B=3,T=65: loss is wrong")
    number = "loss/relative_norm = 325, 650 times the bound 0.5 (rounding-error analysis, precise) at [3, 17]"
    assert text.splitlines()[first + 1] == f"        measured: {number}"
    assert "fp16: 1 of 1 cases fail" in text
    order = [
        "What is wrong:",
        "To run one failure again:",
        "Number of cases with each verdict:",
        "Standard precise",
        "The audit fails",
    ]
    assert sorted(order, key=text.index) == order
    assert "ktonum audit kto --dtype bf16 --only 'kto[B=3,T=65]-bf16-cpu::forward'" in text
    assert "The audit fails: 1 passed, 3 FAIL." in text
    assert "Standard precise (it decides): met in fp32; missed in bf16 (forward); fp16 (forward)." in text


def test_errors_of_one_kind_are_reported_once() -> None:
    group = [
        result(
            Verdict.ERROR, check=c, dims=d, reason="the candidate raised ValueError: no", details="a\nb\nValueError: no"
        )
        for c in ("forward", "gradients")
        for d in ({"B": 1}, {"B": 2})
    ]
    found = findings(group)
    assert len(found) == 1
    assert found[0].headline == "every check: ERROR on 4 of 4 verdicts: the candidate raised ValueError: no"
    assert "ValueError: no" in found[0].lines[-1]


def test_a_vacuous_check_is_no_pass() -> None:
    text = text_of(result(), result(power=None, dims={"B": 9}))
    assert "forward is vacuous on 1 of 2 cases" in text
    assert "The audit fails: 1 passed, 1 vacuous." in text


@pytest.mark.parametrize(
    ("results", "planned", "strict", "words"),
    [
        (
            (result(), result(Verdict.INCONCLUSIVE, reason="too small")),
            None,
            False,
            "The audit passes: 1 passed, 1 INCON",
        ),
        ((result(), result(Verdict.INCONCLUSIVE, reason="too small")), None, True, "The audit fails, because --strict"),
        ((result(Verdict.INCONCLUSIVE, reason="too small"),), None, False, "The audit decided nothing"),
        ((result(),), 3, False, "The audit is unfinished: 1 passed, 2 not run"),
        ((), 3, False, "The audit is unfinished: 0 passed, 3 not run"),
    ],
)
def test_the_last_line_says_how_it_ended(
    results: tuple[CheckResult, ...], planned: int | None, strict: bool, words: str
) -> None:
    text = text_of(*results, planned=planned, strict=strict)
    assert words in text
    if any(r.verdict is Verdict.INCONCLUSIVE for r in results):
        assert "too small (every check; 1 case in bf16)" in text or "too small (forward; 1 case in bf16)" in text


def test_brackets_in_names_are_no_markup_and_narrow_terminals_lose_nothing() -> None:
    text = text_of(result(Verdict.ERROR, reason="got [red]x[/red] instead"), width=30)
    assert "[red]x[/red]" in text.replace("\n", "").replace("  ", "")
    assert all(len(line) <= 30 for line in text.splitlines() if "--only" not in line)


def test_tables_for_other_reports() -> None:
    results = (result(), FAIL, result(check="law:padding", dtype="fp32"))
    found = matrix(results)
    assert found.dtypes == ("bf16", "fp32")
    assert found.rows[0] == ("forward", (("1 FAIL, 1 PASS", "FAIL"), ("", "")))
    assert dict(standards(results)) == {
        "precise": "met in fp32; missed in bf16 (forward)",
        "eager": "met in bf16, fp32",
    }
    assert {r.check for r in power_rows(results)} == {"forward", "law:padding"}
