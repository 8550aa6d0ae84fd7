"""Planned items as pytest items, and their results in pytest's reports.

Imports torch only when an item runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ktonum.auditing.plan import PlannedItem
from ktonum.report.failure_text import describe_result
from ktonum.report.sentences import reason_words
from ktonum.results import CheckResult, Verdict

__all__ = [
    "PREFIX",
    "AuditItem",
    "collect_items",
    "forget_in_junit",
    "name_in_junit",
    "node_id",
    "put_result",
    "result_of",
]

#: The first part of every item's node id.
PREFIX = "ktonum"
# Under this name an item's result travels from a worker to the controller.
_PROPERTY = "ktonum"


class AuditFailure(Exception):
    """A verdict that fails its item; the text is all that a reader gets to see."""


class _AuditCollector(pytest.Collector):
    """The parent of every item. Flat: pytest gives a collector whose name has brackets no children."""

    def collect(self) -> list[pytest.Item]:
        """Nothing: its items are made by `collect_items`."""
        return []


class AuditItem(pytest.Item):
    """One planned item.

    Args:
        planned: The item.
        run: Gives the item's result.
        fails: Whether a result fails its test.
        rest: For pytest.
    """

    def __init__(
        self,
        *,
        planned: PlannedItem,
        run: Callable[[PlannedItem], CheckResult],
        fails: Callable[[CheckResult], bool],
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self._planned = planned
        self._run = run
        self._fails = fails

    def runtest(self) -> None:
        """Run the item, leave its result in ``user_properties``, and translate the verdict for pytest.

        Raises:
            AuditFailure: The result fails the test.
        """
        result = self._run(self._planned)
        self.user_properties.append(_as_property(result))
        if self._fails(result):
            raise AuditFailure(describe_result(result))
        if result.verdict is Verdict.INCONCLUSIVE:
            raise pytest.skip.Exception(f"INCONCLUSIVE: {reason_words(result)}", _use_item_location=True)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The verdict in words; a traceback only for what is no verdict."""
        if isinstance(excinfo.value, AuditFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str], int, str]:
        """Where pytest says the item is: it has no file."""
        return Path(PREFIX), 0, self.nodeid


def node_id(item: PlannedItem) -> str:
    """``ktonum::CASE::CHECK``: how pytest names the item."""
    return f"{PREFIX}::{item.name}"


def collect_items(
    session: pytest.Session,
    items: Sequence[PlannedItem],
    run: Callable[[PlannedItem], CheckResult],
    fails: Callable[[CheckResult], bool],
) -> list[pytest.Item]:
    """A test for each item; see `AuditItem` for the arguments."""
    root = _AuditCollector.from_parent(session, name=PREFIX, nodeid=PREFIX)
    return [AuditItem.from_parent(root, name=item.name, planned=item, run=run, fails=fails) for item in items]


def result_of(report: pytest.TestReport) -> CheckResult | None:
    """The result that a report carries: one of an item's reports does, and none of an ordinary test."""
    if report.when in ("setup", "teardown"):
        return None
    for name, value in report.user_properties:
        if name == _PROPERTY and isinstance(value, str):
            return CheckResult.from_record(json.loads(value))
    return None


def put_result(report: pytest.TestReport, result: CheckResult) -> None:
    """Have xdist's report of a crash carry the result of the item that was running."""
    report.user_properties = [_as_property(result)]
    report.longrepr = describe_result(result)
    report.location = (PREFIX, 0, report.nodeid)


def _as_property(result: CheckResult) -> tuple[str, str]:
    return _PROPERTY, json.dumps(result.to_record())


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
