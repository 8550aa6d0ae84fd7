"""`ktonum.audit`: every check on every case, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ktonum.auditing.devices import resolve_device
from ktonum.auditing.judge import check_named, run_check
from ktonum.case.context import CaseContext
from ktonum.checks import checks_for
from ktonum.declare.cases import Case, parse_dtypes
from ktonum.declare.op import Op
from ktonum.errors import UsageError
from ktonum.report.environment import describe_environment
from ktonum.results import STANDARDS, CheckResult, Report

__all__ = ["audit", "audit_case", "audit_items"]


def audit(
    op: Op,
    *,
    dtypes: Sequence[str] | str | None = None,
    device: str = "auto",
    profile: str = "quick",
    standard: str = "precise",
    on_result: Callable[[CheckResult], None] | None = None,
) -> Report:
    """Run every check on every case of ``op`` and collect the verdicts.

    This uses one process and one device. ``ktonum audit`` on the command line spreads the same work over GPUs.

    Args:
        op: The op under audit.
        dtypes: Some of bf16, fp16, fp32 and fp64, as a sequence or separated by commas; None for all.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        profile: ``quick`` or ``full``.
        standard: ``precise`` or ``eager``.
        on_result: Called with each result as it comes.

    Raises:
        UsageError: An argument is not accepted. Exceptions of the candidate become verdicts instead.
    """
    names = parse_dtypes(dtypes if dtypes is None or isinstance(dtypes, str) else tuple(dtypes))
    kind = resolve_device(device)
    if standard not in STANDARDS:
        raise UsageError(f"unknown standard {standard!r}: use {' or '.join(STANDARDS)}")
    where = torch.device(device if ":" in device else kind)
    results = []
    for case in op.cases(profile=profile, dtypes=names, device=kind):
        context = CaseContext(op, case, where)
        for check in checks_for(op, case):
            results.append(run_check(check, context, standard))
            if on_result is not None:
                on_result(results[-1])
    return Report(tuple(results), describe_environment(kind))


def audit_case(op: Op, case: Case, check: str, *, standard: str = "precise") -> CheckResult:
    """Run one check on one case, in this process.

    Args:
        op: The op under audit.
        case: A case of ``op``.
        check: The check's name, e.g. ``gradients``.
        standard: ``precise`` or ``eager``.

    Raises:
        UsageError: No check of this name applies to the case, or the device or the standard is not accepted.
    """
    resolve_device(case.device)
    return run_check(check_named(op, case, check), CaseContext(op, case), standard)


def audit_items(op: Op, *, profile: str, dtypes: Sequence[str], device: str) -> list[tuple[Case, str]]:
    """Every pair (case, check name) of an audit. The checks of a case follow each other."""
    return [
        (case, check.name)
        for case in op.cases(profile=profile, dtypes=dtypes, device=device)
        for check in checks_for(op, case)
    ]
