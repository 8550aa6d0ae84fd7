"""Reading an audit's JSON for a gate: what is none, or belongs to another audit, is refused in one line."""

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
        path: What `Report.to_json` or ``ktonum audit --json`` wrote.
        role: What the file was given as, for messages: ``CURRENT`` or ``--baseline``.

    Raises:
        UsageError: There is no such file, or it is not an audit's JSON of a known schema, or holds no results.
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
        raise UsageError(f"{named} holds no results, the audit ended before any: audit again")
    for r in report.results:
        if any(m.value < 0 or m.bound < 0 or math.isnan(m.bound) for m in r.measurements):
            raise UsageError(f"{named} is damaged, a value or bound of {r.case}::{r.check} is impossible: {_WRITE}")
    (case, check), count = Counter((r.case, r.check) for r in report.results).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{named} is damaged, it holds {case}::{check} {count} times: {_WRITE}")


def check_comparable(baseline: Report, current: Report) -> None:
    """Check that both are audits of one op under one standard.

    Raises:
        UsageError: They are not.
    """
    before, now = (_ops(report) for report in (baseline, current))
    if not before & now:
        raise UsageError(
            f"CURRENT audits {', '.join(sorted(now))}, --baseline {', '.join(sorted(before))}: name a baseline of the "
            f"same op"
        )
    old, new = ({r.standard for r in report.results} for report in (baseline, current))
    if old != new:
        raise UsageError(
            f"CURRENT is held to {', '.join(sorted(new))}, --baseline to {', '.join(sorted(old))}: audit again with "
            f"the baseline's --standard"
        )


def _ops(report: Report) -> set[str]:
    return {r.parts.op or "an unnamed op" for r in report.results}


def described(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions, device and how the audit was asked for, flat: what may differ between two audits."""
    packages, device, audit = (_mapping(environment.get(k)) for k in ("packages", "device", "audit"))
    asked = {k: audit.get(k) for k in ("candidate", "profile")}
    others = {k: environment.get(k) for k in ("ktonum", "python", "commit")}
    named = {**{f"device {k}": v for k, v in device.items()}, **packages, **others, **asked}
    return {k: str(v) for k, v in named.items() if v is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
