"""An audit as pytest items: one for each check on each case.

Imports torch only when an item runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ktonum.auditing.plan import AuditPlan, PlannedItem
from ktonum.auditing.worker_process import AuditProcess, context_lost
from ktonum.results import CheckResult, Verdict

if TYPE_CHECKING:
    from ktonum.case.context import CaseContext

__all__ = [
    "PREFIX",
    "AuditItem",
    "ItemRunner",
    "collect_items",
    "crash_result",
    "describe_result",
    "forget_in_junit",
    "name_in_junit",
    "result_of",
]

#: The first part of every item's node id.
PREFIX = "ktonum"
# Under this name an item's result travels from a worker to the controller.
_PROPERTY = "ktonum"


class ItemRunner:
    """Runs the items of one process and keeps what the checks of a case share.

    Attributes:
        process: This process.
        standard: What candidates are held to.
        strict: Whether INCONCLUSIVE fails.
        time_limit: Seconds an item may take in a worker; 0 for no limit.
        lost_in: The item in which this process lost its CUDA context; empty as long as it has not.
    """

    def __init__(self, process: AuditProcess, *, standard: str, strict: bool, time_limit: float) -> None:
        self.process = process
        self.standard = standard
        self.strict = strict
        self.time_limit = time_limit
        self.lost_in = ""
        self._context: CaseContext | None = None

    def run(self, item: PlannedItem) -> CheckResult:
        """The verdict of one item."""
        from ktonum.auditing.judge import check_named, run_check

        if self.lost_in:
            return CheckResult(
                item.case.name,
                item.check,
                Verdict.ERROR,
                reason=f"not run: this process lost its CUDA context in {self.lost_in}; -n 1 would have replaced it",
                standard=self.standard,
            )
        self.process.limit_time(self.time_limit)
        try:
            with _one_thread():
                if item.work is not None:
                    result = item.work()
                else:
                    check = check_named(item.op, item.case, item.check)
                    result = run_check(check, self._context_of(item), self.standard)
        finally:
            self.process.lift_limit()
        if (result.verdict is Verdict.ERROR or item.case.device == "cuda") and context_lost(
            f"{result.reason}\n{result.details}"
        ):
            self.lost_in = item.name
            if result.verdict is not Verdict.ERROR:
                reason = "the CUDA context was lost while the candidate ran, after results had been read"
                lost = {"verdict": Verdict.ERROR, "reason": reason, "power": (), "meets": ()}
                result = CheckResult(**{**vars(result), **lost})
        return result

    def _context_of(self, item: PlannedItem) -> CaseContext:
        """The item's case. One is kept: items come case by case, and a production-size case fills half a GPU."""
        from ktonum.case.context import CaseContext

        kept = self._context
        if kept is None or kept.op is not item.op or kept.case.name != item.case.name:
            self._context = None
            del kept
            self._context = CaseContext(item.op, item.case)
        assert self._context is not None
        return self._context


class AuditFailure(Exception):
    """A verdict that fails its item; the text is all that a reader gets to see."""


class _AuditCollector(pytest.Collector):
    """The parent of every item. Flat: pytest gives a collector whose name has brackets no children."""

    def collect(self) -> list[pytest.Item]:
        """Nothing: its items are made by `collect_items`."""
        return []


class AuditItem(pytest.Item):
    """One check on one case."""

    def __init__(self, *, planned: PlannedItem, runner: ItemRunner, **rest: Any) -> None:
        super().__init__(**rest)
        self.planned = planned
        self.runner = runner

    def runtest(self) -> None:
        """Run the check, leave its result in ``user_properties``, and translate the verdict for pytest.

        Raises:
            AuditFailure: FAIL, ERROR, a vacuous PASS, or INCONCLUSIVE under ``--ktonum-strict``.
        """
        result = self.runner.run(self.planned)
        self.user_properties.append((_PROPERTY, json.dumps(result.to_record())))
        if result.failed or (self.runner.strict and result.verdict is Verdict.INCONCLUSIVE):
            raise AuditFailure(describe_result(result))
        if result.verdict is Verdict.INCONCLUSIVE:
            raise pytest.skip.Exception(f"INCONCLUSIVE: {result.reason}", _use_item_location=True)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The verdict in words; a traceback only for what is no verdict."""
        if isinstance(excinfo.value, AuditFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str], int, str]:
        """Where pytest says the item is: it has no file."""
        return Path(PREFIX), 0, self.nodeid


def collect_items(session: pytest.Session, plan: AuditPlan, runner: ItemRunner) -> list[pytest.Item]:
    """The plan's items, called ``ktonum::CASE::CHECK``."""
    root = _AuditCollector.from_parent(session, name=PREFIX, nodeid=PREFIX)
    return [AuditItem.from_parent(root, name=planned.name, planned=planned, runner=runner) for planned in plan.items]


def result_of(report: pytest.TestReport) -> CheckResult | None:
    """The result that a report carries: one of an item's reports does, and none of an ordinary test."""
    if report.when in ("setup", "teardown"):
        return None
    for name, value in report.user_properties:
        if name == _PROPERTY and isinstance(value, str):
            return CheckResult.from_record(json.loads(value))
    return None


def crash_result(report: pytest.TestReport, reason: str, trace: str, standard: str) -> CheckResult:
    """The verdict on an item whose worker died, put into xdist's report of the crash."""
    case, _, check = report.nodeid.removeprefix(f"{PREFIX}::").partition("::")
    result = CheckResult(case, check, Verdict.ERROR, reason=reason, details=trace, standard=standard)
    report.user_properties = [(_PROPERTY, json.dumps(result.to_record()))]
    report.longrepr = describe_result(result)
    report.location = (PREFIX, 0, report.nodeid)
    return result


def name_in_junit(config: pytest.Config, report: pytest.TestReport) -> None:
    """Have ``--junitxml`` call the item by its name: pytest takes a name apart at its brackets, and ours have more."""
    xml = _junit(config)
    if xml is not None:
        reporter = xml.node_reporter(report)
        reporter.add_attribute("classname", PREFIX)
        reporter.add_attribute("name", report.nodeid.removeprefix(f"{PREFIX}::"))


def forget_in_junit(config: pytest.Config, report: pytest.TestReport) -> None:
    """Keep a report that says nothing new out of ``--junitxml``, where it would become a second test case."""
    xml = _junit(config)
    if xml is not None:
        xml.node_reporters_ordered.remove(xml.node_reporter(report))


def _junit(config: pytest.Config) -> Any:
    from _pytest.junitxml import xml_key  # where the fixture record_xml_attribute finds it, too

    return config.stash.get(xml_key, None)


def describe_result(result: CheckResult) -> str:
    """A verdict in a few lines: the reason, what was measured, and the candidate's traceback."""
    verdict = "vacuous" if result.vacuous else result.verdict.value
    lines = [f"{verdict}: {result.reason}" if result.reason else verdict]
    if result.verdict is Verdict.FAIL:
        for m in sorted(result.measurements, key=lambda m: -m.use):
            if not m.within:
                unit = "" if m.unit in ("1", "bound") else f" {m.unit}"
                at = f" at {m.where}" if m.where else ""
                lines.append(f"  {m.name} = {m.value:.4g}{unit}, bound {m.bound:.4g}{at}  ({m.bound_source})")
        for place in result.localisations:
            lines += [f"  {line}" for line in place.lines]
        lines.append(f"  decided by the standard {result.standard}; meets {', '.join(result.meets) or 'none'}")
    if result.details:
        lines.append(result.details.rstrip())
    return "\n".join(lines)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A sum split over threads depends on their number, and workers share the cores.

    On a GPU, too, for what is small is measured on the CPU: with 16 workers of 32 threads each, blocks of a calibration
    that were to take seconds had not ended after five minutes.
    """
    import torch

    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
