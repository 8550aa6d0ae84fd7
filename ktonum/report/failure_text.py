"""One result in a few lines, for readers who do not see the whole audit: of pytest's failures, JUnit XML, scripts."""

from __future__ import annotations

import shlex

from ktonum.report.sentences import excess_words, place_lines, reason_words, wrong_words
from ktonum.results import CheckResult, Verdict

__all__ = ["describe_result"]


def describe_result(result: CheckResult) -> str:
    """A verdict in a few lines: what is wrong, where, what it looks like, how to run it again, and last the numbers."""
    verdict = "vacuous" if result.vacuous else result.verdict.value
    beyond = sorted((m for m in result.measurements if not m.within), key=lambda m: -m.use)
    numbers = [excess_words(m) for m in beyond] if result.verdict is Verdict.FAIL else []
    what = result.reason or wrong_words(result) if numbers else ""
    lines = [": ".join(filter(None, (verdict, what or reason_words(result))))]
    if result.verdict is Verdict.FAIL and result.question:
        lines.append(f"  expected: {result.question}")
    for found in result.localisations:
        lines += [f"  {line}" for line in place_lines(found)]
    if result.failed:
        item = f"{result.case}::{result.check}"
        lines.append(f"  run again: ktonum audit OP --only {shlex.quote(item)}")
        lines.append(f"  or: pytest --ktonum {shlex.quote(f'ktonum::{item}')}")
    lines += [f"  measured: {line}" for line in numbers]
    if result.verdict is Verdict.FAIL:
        met = ", ".join(result.meets) or "no standard"
        lines.append(f"  the standard {result.standard} decides; the candidate meets {met} here")
    if result.details:
        lines.append(result.details.rstrip())
    return "\n".join(lines)
