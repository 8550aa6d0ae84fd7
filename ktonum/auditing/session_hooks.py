"""pytest's hooks in a session that runs planned items, in its first process and in each of its workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.audit_settings import SessionSettings
from ktonum.auditing.item_runner import ItemRunner
from ktonum.auditing.plan import PlannedItem
from ktonum.auditing.pytest_items import PREFIX, collect_items, name_in_junit, node_id, result_of
from ktonum.auditing.worker_crashes import CrashTrace, CrashTraces, end_worker, handle_crash
from ktonum.errors import UsageError
from ktonum.results import CheckResult

__all__ = ["SessionHooks", "sent_settings"]

# Under this name xdist's workerinput carries the settings.
_SENT = "ktonum"


def sent_settings(config: pytest.Config) -> SessionSettings[Any] | None:
    """The settings that the controller sent to this worker; None where there are none."""
    sent = getattr(config, "workerinput", {}).get(_SENT)
    return None if sent is None else SessionSettings.from_bytes(sent)


class SessionHooks:
    """One session's planned items and, where results arrive, the results.

    Args:
        settings: What was asked for.
        process: This process.
        items: What to run; empty to plan it when the session starts.
        on_result: Called with each result as it arrives.

    Attributes:
        results: Results by node id, the first one of each item.
    """

    def __init__(
        self,
        settings: SessionSettings[Any],
        process: AuditProcess,
        *,
        items: Sequence[PlannedItem] = (),
        on_result: Callable[[CheckResult], None] | None = None,
    ) -> None:
        self.settings = settings
        self.results: dict[str, CheckResult] = {}
        self._process = process
        self._on_result = on_result
        self._traces = CrashTraces(process)
        self._runner = ItemRunner(self._traces, settings.timeout)
        self._items = {node_id(item): item for item in items}

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Leave to pytest only the files and folders among the arguments."""
        self._config = config
        config.args = [] if self.settings.alone else [a for a in config.args if not a.startswith(f"{PREFIX}::")]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Make the plan before workers start, so that a mistake is reported once and not by each of them.

        Raises:
            pytest.UsageError: There is nothing to run, or an op or candidate cannot be loaded.
        """
        if not self._items:
            try:
                # Made anew in each process, from the same settings: ops are Python objects, which cannot travel.
                plan = self.settings.make_plan(self._process.device)
            except UsageError as error:
                raise pytest.UsageError(f"ktonum: {error}") from error
            self._items = {node_id(item): item for item in plan.items}
        if self.settings.alone:
            # Not where other tests run, too: their crashes belong where pytest's own faulthandler puts them.
            self._traces.enable()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Send the settings to a worker that is about to start."""
        node.workerinput[_SENT] = self.settings.to_bytes()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Compare a worker's plan with this process's; xdist compares those of the workers.

        Raises:
            UsageError: They differ.
        """
        for found in ids:
            if found.startswith(f"{PREFIX}::") and found not in self._items:
                raise UsageError(
                    f"worker {node.gateway.id} planned {found.removeprefix(f'{PREFIX}::')}, which this process did "
                    f"not: make the op's points the same in every process"
                )

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the planned items to the collected tests; first, so that ``-k`` and ``-m`` see them."""
        items += collect_items(session, list(self._items.values()), self._runner.run, self.settings.fails)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result that a report carries, the first one of each item."""
        result = result_of(report)
        if result is not None and report.nodeid not in self.results:
            self.results[report.nodeid] = result
            if self._on_result is not None:
                self._on_result(result)
        if report.nodeid in self._items and report.when != "teardown":
            name_in_junit(self._config, report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Turn the death of a worker into a verdict, where it was running one of our items."""
        if crashitem in self._items:
            handle_crash(
                report,
                self._items[crashitem],
                CrashTrace.read(self._process.folder, report.node.gateway.id),  # xdist says whose crash it is
                config=self._config,
                has_result=crashitem in self.results,
                timeout=self.settings.timeout,
            )

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Replace a worker whose CUDA context is lost, now that the reports of its item are sent."""
        if self._runner.lost_in and self._process.worker:
            end_worker()
