"""An audit's results in words and small tables, for the terminal and for HTML.

Like `ktonum.results`, it handles text and numbers only, without torch and without a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ktonum.declare.cases import DTYPES
from ktonum.report.sentences import excess_words, place_lines, reason_words, short_case, sizes_words, wrong_words
from ktonum.results import STANDARDS, Cause, CheckResult, Report, Verdict

__all__ = [
    "Ending",
    "Finding",
    "Matrix",
    "checks_of",
    "dtypes_of",
    "ending",
    "findings",
    "inconclusive_reasons",
    "matrix",
    "standards",
]

# The number of failing tensors for which a finding says where they are wrong. The result has all of them.
_TENSORS_SHOWN = 2


@dataclass(frozen=True)
class Matrix:
    """Verdicts by check and dtype. Each cell has a text and its worst verdict."""

    dtypes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class Ending:
    """Whether an audit passed, and a sentence that says so with the number of each verdict."""

    passed: bool
    sentence: str


@dataclass(frozen=True)
class Finding:
    """A failure that one or more results share.

    Attributes:
        check: The check that failed.
        headline: The failure and the number of cases.
        lines: The worst case of each dtype, or a part of a traceback.
        example: The worst result.
    """

    check: str
    headline: str
    lines: tuple[str, ...]
    example: CheckResult


def matrix(results: Sequence[CheckResult]) -> Matrix:
    """Verdicts by check and dtype. A cell's second part is its worst verdict."""
    dtypes = dtypes_of(results)
    rows = []
    for check in checks_of(results):
        cells = []
        for dtype in dtypes:
            here = [r for r in results if r.check == check and r.parts.dtype == dtype]
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
    """For each standard the dtypes that meet it, and the dtypes and checks that do not; INCONCLUSIVE does not count."""
    lines = []
    for standard in STANDARDS:
        met, missed = [], []
        for dtype in dtypes_of(results):
            here = [
                r for r in results if r.parts.dtype == dtype and (r.meets or r.verdict in (Verdict.FAIL, Verdict.ERROR))
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
    """The failures. Results with the same failure make one finding."""
    found = []
    for check in checks_of(results):
        asked = [r for r in results if r.check == check]
        failed = [r for r in asked if r.verdict is Verdict.FAIL]
        if failed:
            found.append(_failure(check, failed, asked))
        vacuous = [r for r in asked if r.vacuous]
        if vacuous:
            head = f"{check} is vacuous on {_share(vacuous, asked)}: {reason_words(vacuous[0])}"
            found.append(Finding(check, head, tuple(short_case(r) for r in vacuous[:3]), vacuous[0]))
    # Often all checks get the same exception. It is reported once.
    errors: dict[str, list[CheckResult]] = {}
    for r in results:
        if r.verdict is Verdict.ERROR:
            errors.setdefault(reason_words(r), []).append(r)
    for reason, group in errors.items():
        checks = checks_of(group)
        asked = [r for r in results if r.check in checks]
        named = ", ".join(checks) if len(checks) < len(checks_of(results)) or len(checks) == 1 else "every check"
        head = f"{named}: ERROR on {_share(group, asked, 'verdict')}: {reason}"
        trace = [line for line in group[0].details.rstrip().splitlines() if line.strip()]
        # The place is at the end of a Python traceback, but at the start of the trace of a crashed process.
        inner = trace[1:4] if group[0].cause in (Cause.HUNG, Cause.DIED) else trace[-3:]
        found.append(Finding(checks[0], head, (f"first in {short_case(group[0])}", *inner), group[0]))
    return tuple(found)


def _failure(check: str, failed: Sequence[CheckResult], asked: Sequence[CheckResult]) -> Finding:
    """For each dtype its worst case: which tensors are wrong, where, what they look like, and last the number."""
    lines = []
    for dtype in dtypes_of(failed):
        here = [r for r in failed if r.parts.dtype == dtype]
        r = max(here, key=_use)
        of = sum(a.parts.dtype == dtype for a in asked)
        what = r.reason or wrong_words(r) or reason_words(r)
        lines.append(f"{dtype or 'any dtype'}: {len(here)} of {of} cases fail, the worst is {_where(r)}: {what}")
        lines += [f"  {line}" for found in r.localisations[:_TENSORS_SHOWN] for line in place_lines(found)]
        if r.worst is not None and not r.worst.within:
            lines.append(f"  measured: {excess_words(r.worst)}")
    expected = f"; expected: {failed[0].question}" if failed[0].question else ""
    return Finding(check, f"{check} fails on {_share(failed, asked)}{expected}", tuple(lines), max(failed, key=_use))


def _where(result: CheckResult) -> str:
    distribution = result.parts.distribution
    return sizes_words(result) + ("" if distribution == "normal" else f" ({distribution})")


def inconclusive_reasons(results: Sequence[CheckResult]) -> tuple[str, ...]:
    """The reasons of INCONCLUSIVE verdicts, each once."""
    groups: dict[str, list[CheckResult]] = {}
    for r in results:
        if r.verdict is Verdict.INCONCLUSIVE:
            groups.setdefault(reason_words(r), []).append(r)
    lines = []
    for reason, group in groups.items():
        checks = checks_of(group)
        named = ", ".join(checks) if len(checks) < len(checks_of(results)) else "every check"
        cases = len({r.case for r in group})
        lines.append(f"{reason} ({named}; {cases} case{'s' * (cases > 1)} in {', '.join(dtypes_of(group))})")
    return tuple(lines)


def ending(report: Report, *, planned: int, strict: bool = False) -> Ending:
    """How an audit ended.

    Args:
        report: The results.
        planned: The number of expected results.
        strict: Whether INCONCLUSIVE fails the audit.
    """
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
    passed = False
    if report.failures:
        word = "The audit fails"
    elif unmeasured > 0:
        word = "The audit is unfinished"
    elif not any(r.verdict is Verdict.PASS for r in report.results):
        word = "The audit decided nothing, and fails"
    elif strict and report.inconclusive:
        word = "The audit fails, because --strict was given"
    else:
        word, passed = "The audit passes", True
    return Ending(passed, f"{word}: {', '.join(parts)}.")


def _use(result: CheckResult) -> float:
    return 0.0 if result.worst is None else result.worst.use


def _share(some: Sequence[CheckResult], asked: Sequence[CheckResult], what: str = "case") -> str:
    return f"{len(some)} of {len(asked)} {what}{'s' * (len(asked) > 1)}"


def dtypes_of(results: Iterable[CheckResult]) -> tuple[str, ...]:
    """The dtypes of the results: known ones in the usual order, then others."""
    seen = dict.fromkeys(r.parts.dtype for r in results)
    return (*(d for d in DTYPES if d in seen), *(d for d in seen if d not in DTYPES))


def checks_of(results: Iterable[CheckResult]) -> tuple[str, ...]:
    """The checks of the results, in their order."""
    return tuple(dict.fromkeys(r.check for r in results))
