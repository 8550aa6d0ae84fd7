"""What an audit's results amount to, in words and small tables; terminal and HTML show the same.

A leaf like `ktonum.results`: text and numbers, neither torch nor a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ktonum.declare.cases import DTYPES
from ktonum.report.case_names import CaseName
from ktonum.results import STANDARDS, CheckResult, Measurement, Report, Verdict

__all__ = [
    "CaseName",
    "Finding",
    "Matrix",
    "checks_of",
    "closing_sentence",
    "dtypes_of",
    "findings",
    "format_measured",
    "inconclusive_reasons",
    "matrix",
    "measured",
    "place",
    "standards",
]

# Of how many failing tensors a finding says where they are wrong; a result has all of them.
_TENSORS_SHOWN = 2


@dataclass(frozen=True)
class Matrix:
    """Verdicts by check and dtype: for each check a cell's text by dtype, and whether it fails."""

    dtypes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, seen in one or more results.

    Attributes:
        check: The check that failed.
        headline: What happened and how often.
        lines: The worst of each dtype, or the start of a traceback.
        example: The worst result.
    """

    check: str
    headline: str
    lines: tuple[str, ...]
    example: CheckResult


def measured(result: CheckResult) -> str:
    """The worst measurement as ``name = value / bound``; empty when there is none."""
    return "" if result.worst is None else format_measured(result.worst)


def format_measured(m: Measurement) -> str:
    """``name = value / bound``, with the unit and the standard error where there is one."""
    unit = "" if m.unit in ("1", "bound") else f" {m.unit}"
    error = "" if m.standard_error is None else f" ± {m.standard_error:.1g}"
    return f"{m.name} = {m.value:.3g}{error} / {m.bound:.3g}{unit}"


def place(m: Measurement) -> str:
    """`` at [3, 17]``; empty for a number without place."""
    return f" at {m.where}" if m.where not in ("", "[]") else ""


def matrix(results: Sequence[CheckResult]) -> Matrix:
    """Verdicts by check and dtype. A cell's second part is its worst verdict."""
    dtypes = dtypes_of(results)
    rows = []
    for check in checks_of(results):
        cells = []
        for dtype in dtypes:
            here = [r for r in results if r.check == check and CaseName.read(r.case).dtype == dtype]
            cells.append(_cell(here))
        rows.append((check, tuple(cells)))
    return Matrix(dtypes, tuple(rows))


def _cell(results: Sequence[CheckResult]) -> tuple[str, str]:
    if not results:
        return "", ""
    tests: tuple[tuple[str, Callable[[CheckResult], bool]], ...] = (
        ("ERROR", lambda r: r.verdict is Verdict.ERROR),
        ("FAIL", lambda r: r.verdict is Verdict.FAIL),
        ("vacuous", lambda r: r.vacuous),
        ("INCONCLUSIVE", lambda r: r.verdict is Verdict.INCONCLUSIVE),
        ("PASS", lambda r: r.verdict is Verdict.PASS and not r.vacuous),
    )
    counts = [(name, sum(map(test, results))) for name, test in tests]
    present = [(name, count) for name, count in counts if count]
    if len(present) == 1:
        name, count = present[0]
        return f"{count} {name}", name
    return ", ".join(f"{count} {name}" for name, count in present), present[0][0]


def standards(results: Sequence[CheckResult]) -> tuple[tuple[str, str], ...]:
    """For each standard where it is met and where it is missed, by dtype; results that cannot tell do not count."""
    lines = []
    for standard in STANDARDS:
        met, missed = [], []
        for dtype in dtypes_of(results):
            here = [
                r
                for r in results
                if CaseName.read(r.case).dtype == dtype and (r.meets or r.verdict in (Verdict.FAIL, Verdict.ERROR))
            ]
            checks = list(dict.fromkeys(r.check for r in here if standard not in r.meets))
            if checks:
                missed.append(f"{dtype or 'all'} ({', '.join(checks)})")
            elif here:
                met.append(dtype or "all")
        parts = [f"met in {', '.join(met)}"] * bool(met) + [f"missed in {'; '.join(missed)}"] * bool(missed)
        if parts:
            lines.append((standard, "; ".join(parts)))
    return tuple(lines)


def findings(results: Sequence[CheckResult]) -> tuple[Finding, ...]:
    """The failures, those that say the same put together."""
    found = []
    for check in checks_of(results):
        asked = [r for r in results if r.check == check]
        failed = [r for r in asked if r.verdict is Verdict.FAIL]
        if failed:
            found.append(_failure(check, failed, asked))
        vacuous = [r for r in asked if r.vacuous]
        if vacuous:
            head = (
                f"{check} is vacuous on {_share(vacuous, asked)}: no planted defect fails it, so its PASS says nothing"
            )
            found.append(Finding(check, head, tuple(f"{CaseName.read(r.case).short}" for r in vacuous[:3]), vacuous[0]))
    # One exception is often met by every check: said once.
    errors: dict[str, list[CheckResult]] = {}
    for r in results:
        if r.verdict is Verdict.ERROR:
            errors.setdefault(r.reason, []).append(r)
    for reason, group in errors.items():
        checks = checks_of(group)
        asked = [r for r in results if r.check in checks]
        named = ", ".join(checks) if len(checks) < len(checks_of(results)) or len(checks) == 1 else "every check"
        head = f"{named}: ERROR on {_share(group, asked, 'verdict')}: {reason}"
        trace = [line for line in group[0].details.rstrip().splitlines() if line.strip()]
        # Where it happened: the end of a Python traceback, the start of what a crashed process leaves.
        crashed = bool(trace) and trace[0].startswith(("Fatal Python error", "Timeout"))
        inner = trace[1:4] if crashed else trace[-3:]
        found.append(Finding(checks[0], head, (f"first in {CaseName.read(group[0].case).short}", *inner), group[0]))
    return tuple(found)


def _failure(check: str, failed: Sequence[CheckResult], asked: Sequence[CheckResult]) -> Finding:
    worst = max(failed, key=_use)
    lines = []
    for dtype in dtypes_of(failed):
        here = [r for r in failed if CaseName.read(r.case).dtype == dtype]
        r = max(here, key=_use)
        of = sum(CaseName.read(a.case).dtype == dtype for a in asked)
        lines.append(f"{dtype or 'case'}: {len(here)} of {of} cases; worst {_sentence(r)}")
        lines += [f"  {line}" for found in r.localisations[:_TENSORS_SHOWN] for line in found.lines]
    return Finding(check, f"{check} fails on {_share(failed, asked)}", tuple(lines), worst)


def _sentence(result: CheckResult) -> str:
    """E.g. ``loss/relative = 0.02, 650 × the 3e-05 granted (rounding analysis), at [3], in B=3,T=65``."""
    m = result.worst
    where = CaseName.read(result.case)
    if m is None:
        return f"{result.reason} in {where.dims}"
    unit = "" if m.unit in ("1", "bound") else f" {m.unit}"
    if m.unit == "bound":
        granted = f"{m.name}: {m.value:.3g} × its bound"
    elif m.bound > 0:
        granted = f"{m.name} = {m.value:.3g}{unit}, {m.use:.3g} × the {m.bound:.3g} granted"
    else:
        granted = f"{m.name} = {m.value:.3g}{unit}, where none is granted"
    source = f" ({m.bound_source})" if m.bound_source else ""
    return f"{granted}{source}{place(m)}, in {where.dims}" + (f" ({where.distribution})" if where.distribution else "")


def inconclusive_reasons(results: Sequence[CheckResult]) -> tuple[str, ...]:
    """Why checks could not tell, each reason once."""
    groups: dict[str, list[CheckResult]] = {}
    for r in results:
        if r.verdict is Verdict.INCONCLUSIVE:
            groups.setdefault(r.reason, []).append(r)
    lines = []
    for reason, group in groups.items():
        checks = checks_of(group)
        named = ", ".join(checks) if len(checks) < len(checks_of(results)) else "every check"
        cases = len({r.case for r in group})
        lines.append(f"{reason} ({named}; {cases} case{'s' * (cases > 1)} in {', '.join(dtypes_of(group))})")
    return tuple(lines)


def closing_sentence(report: Report, *, planned: int, strict: bool = False) -> str:
    """One sentence that says how the audit ended."""
    counts = report.counts()
    unmeasured = planned - len(report.results)
    parts = [
        f"{counts['PASS'] - counts['vacuous']} passed",
        *(
            f"{counts[v.value]} {v.value}"
            for v in (Verdict.FAIL, Verdict.ERROR, Verdict.INCONCLUSIVE)
            if counts[v.value]
        ),
        *([f"{counts['vacuous']} vacuous"] if counts["vacuous"] else []),
        *([f"{unmeasured} not run"] if unmeasured > 0 else []),
    ]
    if report.failures:
        word = "The audit fails"
    elif unmeasured > 0:
        word = "The audit is unfinished"
    elif not any(r.verdict is Verdict.PASS for r in report.results):
        word = "The audit decided nothing, and fails"
    elif strict and report.inconclusive:
        word = "The audit fails, for --strict was given"
    else:
        word = "The audit passes"
    return f"{word}: {', '.join(parts)}."


def _use(result: CheckResult) -> float:
    return 0.0 if result.worst is None else result.worst.use


def _share(some: Sequence[CheckResult], asked: Sequence[CheckResult], what: str = "case") -> str:
    return f"{len(some)} of {len(asked)} {what}{'s' * (len(asked) > 1)}"


def dtypes_of(results: Iterable[CheckResult]) -> tuple[str, ...]:
    """Dtypes in the usual order, others last."""
    seen = dict.fromkeys(CaseName.read(r.case).dtype for r in results)
    return (*(d for d in DTYPES if d in seen), *(d for d in seen if d not in DTYPES))


def checks_of(results: Iterable[CheckResult]) -> tuple[str, ...]:
    """The checks of the results, in their order."""
    return tuple(dict.fromkeys(r.check for r in results))
