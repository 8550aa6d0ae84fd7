"""Reports for people: verdict lines, the summary, the HTML page, on terminals of several kinds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from rich.console import Console

from ktonum.declare.cases import Case, Point
from ktonum.report.failure_text import describe_result
from ktonum.report.html import write_html
from ktonum.report.power_tables import blind_spots, flagged_from, power_rows, weakest_power
from ktonum.report.sentences import bound_words, reason_words, short_case
from ktonum.report.summary import findings, matrix, standards
from ktonum.report.terminal import AuditView, print_summary, verdict_line
from ktonum.results import (
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

ANALYSIS = BoundSource(BoundKind.DERIVED, "precise")


def result(
    verdict: Verdict = Verdict.PASS,
    *,
    check: str = "forward",
    dtype: str = "bf16",
    dims: Mapping[str, int] = MappingProxyType({"B": 3, "T": 65}),
    value: float = 0.25,
    power: float | None = 3e-5,
    reason: str = "",
    details: str = "",
    meets: tuple[str, ...] = ("precise", "eager"),
) -> CheckResult:
    undecided = verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE)
    case = Case("kto", Point(dims), dtype, "cpu")
    return CheckResult(
        case.name,
        check,
        verdict,
        () if undecided else (Measurement("loss", "relative_norm", value, 0.5, "1", ANALYSIS, (3, 17)),),
        ()
        if undecided
        else (Power("loss", "scaling", "by 1 + size", power), Power("loss", "one element", "off by size", power)),
        reason=reason,
        details=details,
        meets=() if undecided else meets,
        parts=case.parts,
    )


MANY = {f"B{i}": 3 for i in range(30)}


def text_of(*results: CheckResult, width: int = 120, planned: int | None = None, strict: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_summary(
        console,
        Report(results),
        standard="precise",
        planned=planned,
        strict=strict,
        command="ktonum audit kto",
        seconds=1.25,
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FAIL = result(Verdict.FAIL, value=325.0, meets=("eager",))


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


def test_a_case_is_called_by_its_parts_or_by_its_name_if_they_are_unknown() -> None:
    case = Case("kto", Point({"B": 3}, {"loss_type": "apo"}, "heavy-tails"), "bf16", "cpu", 12)
    assert short_case(replace(FAIL, parts=case.parts)) == "bf16 B=3,loss_type=apo (heavy-tails) +12"
    assert short_case(replace(FAIL, case="something else", parts=CaseParts())) == "something else"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ANALYSIS, "rounding-error analysis, precise"),
        (BoundSource(BoundKind.MEASURED, scale=4.0, dtype="fp32"), "4 × the error of the reference in fp32"),
        (
            BoundSource(BoundKind.MEASURED, scale=2.0, dtype="bf16", autocast=True),
            "2 × the error of the reference under autocast to bf16",
        ),
        (
            BoundSource(BoundKind.LARGER, "eager", 4.0, "fp16"),
            "the larger one of rounding-error analysis, eager, and 4 × the error of the reference in fp16",
        ),
        (BoundSource(BoundKind.EXACT, text="law 'padding'"), "must be exact: law 'padding'"),
        (BoundSource(BoundKind.TABLE, text="row y/element/fp32/cpu"), "row y/element/fp32/cpu"),
        (BoundSource(BoundKind.ERROR_BAR, scale=2.0), "2 × the error bar of the finite difference"),
        (BoundSource(BoundKind.DECLARED), "declared by the op"),
        (BoundSource(BoundKind.NONE), ""),
    ],
)
def test_every_kind_of_bound_has_words(source: BoundSource, words: str) -> None:
    assert bound_words(source) == words


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_words(cause: Cause) -> None:
    verdict = Verdict.FAIL if cause is Cause.BEYOND_BOUND else Verdict.ERROR
    words = reason_words(replace(result(verdict, value=2.0, reason="own words"), cause=cause))
    says_it_all = (Cause.NOTHING_MEASURED, Cause.CUDA_LOST)
    assert words and words.endswith("own words") is (cause not in says_it_all)


def test_a_failure_says_first_what_is_wrong_and_last_the_numbers() -> None:
    """In order: the wrong tensors, the place, the pattern, the command to run it again, and the numbers."""
    places = (Localisation("loss", "everywhere", "scaled by 2"),)
    beyond = (
        *FAIL.measurements,
        Measurement("loss", "element", 3.0, 1.0, "bound", ANALYSIS, context="at expanded ones"),
        Measurement("y", "differing_elements", 2.0, 0.0, "elements", BoundSource(BoundKind.EXACT, text="law 'a'")),
        Measurement("z", "signed_bias", math.nan, 1.0, "1", ANALYSIS),
    )
    lines = describe_result(replace(FAIL, measurements=beyond, localisations=places)).splitlines()
    assert lines == [
        "FAIL: y, z and 2 more are wrong",
        "  where loss is wrong: everywhere",
        "  loss looks like: scaled by 2",
        "  run again: ktonum audit OP --only 'kto[B=3,T=65]-bf16-cpu::forward'",
        "  or: pytest --ktonum 'ktonum::kto[B=3,T=65]-bf16-cpu::forward'",
        "  measured: y/differing_elements = 2 elements, and none is allowed (must be exact: law 'a')",
        "  measured: z/signed_bias is NaN (rounding-error analysis, precise)",
        "  measured: loss/relative_norm = 325, 650 times the bound 0.5 (rounding-error analysis, precise) at [3, 17]",
        "  measured: loss at expanded ones/element: 3 times the bound (rounding-error analysis, precise)",
        "  the standard precise decides; the candidate meets eager here",
    ]


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
