"""A gate's decision on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ktonum.gate.decision import Attribution, Failure, Gate, Growth
from ktonum.gate.grown_errors import Drift, times
from ktonum.report.sentences import reason_words, short_case
from ktonum.results import CheckResult

__all__ = ["SCHEMA", "closing_sentence", "print_gate", "to_record", "write_json"]

SCHEMA = "ktonum-gate/1"
# Number of lines of each kind. The JSON file has all of them.
_SHOWN = 3
_TOLD = 1
_STYLES = {"FAILS": "bold red", "GREW": "bold red", "VANISHED": "bold red", "note": "yellow", "better": "green"}


def print_gate(console: Console, gate: Gate) -> None:
    """Print a line for each change, the worst first, and then the decision."""
    console.print(f"{gate.compared} checks of {gate.cases} cases are in both audits; {_changed(gate)}", markup=False)
    for mark, what, why in _rows(gate):
        # Lines are not wrapped, so that a search in a log finds them.
        console.print(Text.assemble((f"{mark:<9} ", _STYLES[mark]), f"{why:<16}  {what}"), soft_wrap=True)
    console.print(Text(closing_sentence(gate), style="bold green" if gate.passed else "bold red"), soft_wrap=True)


def _changed(gate: Gate) -> str:
    if not gate.changed:
        return f"none of {gate.errors} errors has changed."
    few = "" if gate.enough_cases else ", in too few cases to tell growth from chance"
    return f"{gate.changed} of {gate.errors} errors have changed{few}."


def _rows(gate: Gate) -> list[tuple[str, str, str]]:
    """Mark, change, and cause of each line."""
    told = [_growth(g) for g in gate.growths if g not in gate.worse]
    lost = [(_lost(standard, count), cause.value) for (standard, cause), count in gate.standards.items()]
    rows = _shortened("FAILS", [_failure(f) for f in gate.failures])
    rows += _shortened("GREW", [_growth(g) for g in gate.worse])
    rows += _shortened("VANISHED", [(where, "") for where in _cases(gate.vanished)])
    rows += _shortened("note", told)
    rows += _shortened("note", lost)
    rows += _shortened("note", [(where, "now INCONCLUSIVE") for where in _cases(gate.undecided)])
    rows += _shortened("note", [(where, "still fails") for where in _cases(gate.known)])
    if gate.environment:
        differing = ", ".join(f"{k} {old} → {new}" for k, (old, new) in gate.environment.items())
        rows.append(("note", differing, Attribution.DEVICE_NEW.value if gate.device_new else "differs"))
    if gate.new:
        rows.append(("note", f"{_number(len(gate.new), 'check')} not in the baseline", Attribution.CASE_NEW.value))
    rows += _shortened("better", [(where, "no longer fails") for where in _cases(gate.fixed)])
    return rows + _shortened("better", [(_drift(d), "") for d in gate.shrunk])


def _shortened(mark: str, found: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    shown = _TOLD if mark in ("note", "better") else _SHOWN
    rows = [(mark, *words) for words in found[:shown]]
    more = len(found) - shown
    return [*rows, (mark, f"{more} more, which --json FILE lists", "")] if more > 0 else rows


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _lost(standard: str, count: int) -> str:
    return f"{_number(count, 'check')} no longer {'meets' if count == 1 else 'meet'} {standard}"


def _failure(failure: Failure) -> tuple[str, str]:
    r = failure.result
    why = reason_words(r).partition("\n")[0] or r.verdict.value
    return f"{r.check} {short_case(r)}: {why}", failure.attribution.value


def _growth(growth: Growth) -> tuple[str, str]:
    words = _drift(growth.drift)
    if growth.attribution in (Attribution.REFERENCE_BETTER, Attribution.BOUND_TIGHTER):
        words += f"; their bounds changed × {growth.drift.bound_ratio:.3g}"
    return words, growth.attribution.value


def _drift(d: Drift) -> str:
    among = f": {', '.join(d.steepest)}" if d.steepest else f" {times(d.ratio)}"
    return f"{d.what} in {d.dtype}{among}, larger in {d.larger} of {d.cases} cases (p = {d.p:.0e})"


def _cases(results: Sequence[CheckResult]) -> list[str]:
    """A line for each case, with its checks."""
    checks: dict[str, list[str]] = {}
    for r in results:
        checks.setdefault(short_case(r), []).append(r.check)
    return [
        f"{case}: {', '.join(names) if len(names) <= _SHOWN else _number(len(names), 'check')}"
        for case, names in checks.items()
    ]


def closing_sentence(gate: Gate) -> str:
    """The decision and its reasons, in a sentence."""
    counts = [
        (len(gate.failures), "new failure", "new failures"),
        (len(gate.worse), "group of errors grew beyond chance", "groups of errors grew beyond chance"),
        (len(gate.vanished), "check vanished", "checks vanished"),
        (len(gate.undecided) if gate.strict else 0, "check became INCONCLUSIVE", "checks became INCONCLUSIVE"),
        (gate.unfinished, "check was not run", "checks were not run"),
    ]
    parts = [f"{n} {one if n == 1 else many}" for n, one, many in counts if n]
    if gate.passed:
        return "The gate passes: nothing is worse than in the baseline."
    meant = "" if gate.failures or gate.unfinished else " If this is intended, use CURRENT as the new baseline."
    return f"The gate fails: {', '.join(parts)}.{meant}"


def to_record(gate: Gate) -> dict[str, Any]:
    """The decision in types that JSON can store. Each result has only its case, check, verdict and reason."""
    return {
        "schema": SCHEMA,
        "passed": gate.passed,
        "sentence": closing_sentence(gate),
        "failures": [
            {**_brief(f.result), "before": f.before, "attribution": f.attribution.value} for f in gate.failures
        ],
        "growths": [{**dataclasses.asdict(g.drift), "attribution": g.attribution.value} for g in gate.growths],
        "shrunk": [dataclasses.asdict(d) for d in gate.shrunk],
        **{
            name: [_brief(r) for r in getattr(gate, name)]
            for name in ("vanished", "undecided", "fixed", "new", "known")
        },
        "standards": [{"standard": s, "attribution": a.value, "results": n} for (s, a), n in gate.standards.items()],
        "environment": {k: {"before": old, "now": new} for k, (old, new) in gate.environment.items()},
        "counts": {
            k: getattr(gate, k) for k in ("compared", "cases", "changed", "errors", "enough_cases", "unfinished")
        },
    }


def _brief(r: CheckResult) -> dict[str, str]:
    return {"case": r.case, "check": r.check, "verdict": r.verdict.value, "reason": reason_words(r)}


def write_json(gate: Gate, path: str | Path) -> None:
    """Write the decision as JSON, see `to_record`."""
    Path(path).write_text(json.dumps(to_record(gate), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
