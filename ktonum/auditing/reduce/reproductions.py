"""Writes a script for each distinct failure of an audit. The script runs one check on one case."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ktonum import __version__
from ktonum.auditing.reduce.own_process import Source, reduce_elsewhere
from ktonum.declare.cases import Case
from ktonum.report.sentences import place_lines, reason_words
from ktonum.results import CheckResult, Verdict

__all__ = ["Source", "distinct", "script", "write_reproductions"]

# File systems accept names of up to 255 bytes.
_LONGEST_NAME = 150


def write_reproductions(
    failures: Sequence[CheckResult],
    cases: Mapping[str, Case],
    source: Source,
    folder: Path,
    *,
    timeout: float | None = None,
) -> Iterator[tuple[Path, str]]:
    """Write a script for each distinct failure, at the smallest case that fails in the same way.

    Args:
        failures: Results that fail an audit.
        cases: Cases by name.
        source: Where the op comes from.
        folder: The folder for the scripts; created if it is needed and not there.
        timeout: Seconds for the search for a smaller case; None for no limit.

    Yields:
        The file, and a phrase that says how its case was found.
    """
    for failure in distinct(failures, cases):
        folder.mkdir(exist_ok=True)
        case, tensor, words = cases[failure.case], _tensor(failure), "not reduced"
        if failure.verdict is Verdict.FAIL:
            case, words = reduce_elsewhere(source, case, failure.check, tensor, timeout=timeout)
        subject = failure.localisations[0].subject if failure.localisations else ""
        path = folder / _file_name(case, failure.check, subject)
        path.write_text(script(failure, case, source, words), encoding="utf-8")
        yield path, words


def distinct(failures: Sequence[CheckResult], cases: Mapping[str, Case]) -> tuple[CheckResult, ...]:
    """One failure for each check and tensor, with the smallest dims; one ERROR for each reason."""
    groups: dict[tuple[str, ...], list[CheckResult]] = {}
    for r in failures:
        if r.case in cases:
            words = (r.check, _tensor(r)) if r.verdict is Verdict.FAIL else (r.verdict, reason_words(r))
            groups.setdefault((cases[r.case].op, *words), []).append(r)
    return tuple(min(group, key=lambda r: sum(cases[r.case].point.dims.values())) for group in groups.values())


def _tensor(result: CheckResult) -> str:
    """The worst failing tensor; empty for checks that do not measure tensors."""
    return result.localisations[0].tensor if result.localisations else ""


def _file_name(case: Case, check: str, subject: str) -> str:
    parts = [re.sub(r"[^A-Za-z0-9.=_+]+", "-", part).strip("-") for part in (case.name, check, subject)]
    return "-".join(p for p in parts if p)[:_LONGEST_NAME] + ".py"


def script(failure: CheckResult, case: Case, source: Source, words: str) -> str:
    """The text of a script that exits with status 1 as long as the check fails, and with 0 when it does not.

    Args:
        failure: The failure in the audit.
        case: The case to run: that of the failure, or a smaller one.
        source: Where the op comes from.
        words: A phrase that says how the case was found.
    """
    place, _, attribute = source.target.rpartition(":")
    target = f"{Path(place).resolve()}:{attribute}" if place.endswith(".py") else source.target
    candidate = source.candidate
    if candidate is not None and candidate.rpartition(":")[0].endswith(".py"):
        place, _, attribute = candidate.rpartition(":")
        candidate = f"{Path(place).resolve()}:{attribute}"
    story = [
        f"{failure.check}: {failure.verdict} in {failure.case}",
        reason_words(failure),
        *(line for found in failure.localisations[:1] for line in place_lines(found)),
        f"This script runs {case.name}; {words}.",
        f"Written by ktonum {__version__}. The exit status is 1 if the check fails, and 0 if it does not.",
    ]
    told = "\n".join(f"# {line}" for text in story for line in text.splitlines())
    interpreted = 'os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported\n'
    point = case.point
    return f"""{told}

import os
import sys

{interpreted if case.device == "cpu" else 'os.environ.pop("TRITON_INTERPRET", None)'}
import torch

import ktonum
from ktonum.report.failure_text import describe_result

torch.set_num_threads(1)  # a sum split over threads depends on their number

op = ktonum.load_op({target!r}, candidate={candidate!r}, folder={source.folder!r})
point = ktonum.Point({dict(point.dims)!r}, {dict(point.parameters)!r}, {point.distribution!r})
case = ktonum.Case(op.name, point, {case.dtype!r}, {case.device!r}, {case.offset!r})
result = ktonum.audit_case(op, case, {failure.check!r}, standard={source.standard!r})

print(describe_result(result))
sys.exit(int(result.failed))
"""
