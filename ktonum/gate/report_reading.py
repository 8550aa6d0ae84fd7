"""Reads an audit's JSON for a gate, and refuses in one line files that are not audits or cannot be compared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktonum.errors import InputError, UsageError
from ktonum.results import Report

__all__ = ["check_comparable", "described", "read_report"]

_WRITE = "write one with `ktonum audit OP --json FILE`"


def read_report(path: str | Path, role: str) -> Report:
    """The report in a file.

    Args:
        path: A file that `Report.to_json` or ``ktonum audit --json`` wrote.
        role: The argument that named the file, for messages: ``CURRENT`` or ``--baseline``.

    Raises:
        UsageError: The file cannot be read, is not an audit's JSON of a known schema, is damaged, or has no results.
    """
    named = f"{role} {str(path)!r}"
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{named} cannot be read ({error.strerror}): {_WRITE}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{named} is not JSON ({error}): {_WRITE}") from error
    try:
        report = Report.from_document(document)
        _check_results(report, named)
    except InputError as error:
        raise UsageError(f"{named} is not an audit that this ktonum can read: {error}") from error
    return report


def _check_results(report: Report, named: str) -> None:
    if not report.results:
        raise UsageError(f"{named} has no results, because the audit ended before its first one: audit again")
    for r in report.results:
        if any(m.value < 0 or m.bound < 0 or math.isnan(m.bound) for m in r.measurements):
            raise UsageError(
                f"{named} is damaged: a value or bound of {r.case}::{r.check} is negative, or a bound is NaN; {_WRITE}"
            )
    (case, check), count = Counter((r.case, r.check) for r in report.results).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{named} is damaged: it has {case}::{check} {count} times; {_WRITE}")


def check_comparable(baseline: Report, current: Report) -> None:
    """Check that both audits have an op in common and the same standards.

    Raises:
        UsageError: They do not.
    """
    before, now = (_ops(report) for report in (baseline, current))
    if not before & now:
        raise UsageError(
            f"CURRENT audits {', '.join(sorted(now))}, but --baseline audits {', '.join(sorted(before))}: give a "
            f"baseline of the same op"
        )
    old, new = ({r.standard for r in report.results} for report in (baseline, current))
    if old != new:
        raise UsageError(
            f"CURRENT is held to {', '.join(sorted(new))}, but --baseline to {', '.join(sorted(old))}: audit again "
            f"with the baseline's --standard"
        )


def _ops(report: Report) -> set[str]:
    return {r.parts.op or "an unnamed op" for r in report.results}


def described(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions, device and settings of an audit as one mapping: all that may differ between two audits."""
    packages, device, audit = (_mapping(environment.get(k)) for k in ("packages", "device", "audit"))
    asked = {k: audit.get(k) for k in ("candidate", "profile")}
    others = {k: environment.get(k) for k in ("ktonum", "python", "commit")}
    named = {**{f"device {k}": v for k, v in device.items()}, **packages, **others, **asked}
    return {k: str(v) for k, v in named.items() if v is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
