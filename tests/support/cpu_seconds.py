"""Counts the CPU seconds of each test file, and fails a session that exceeds its budget.

Machines of one kind differ up to five times in speed, so the budget is a multiple of a yardstick: a fixed piece of work
that every worker times when it starts and when it ends. ``--cpu-budget FILE`` fails a session that costs more.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

__all__ = ["CpuSeconds", "read_budget", "yardstick"]

_PROPERTY = "cpu_seconds"
_SLOWEST = 10


def yardstick() -> float:
    """CPU seconds that a fixed piece of work takes here.

    Half of it is interpreted Python and half small tensor operations, as in the tests: audits of small cases, and
    kernels in Triton's interpreter.
    """
    started = time.process_time()
    table: dict[int, float] = {}
    for i in range(1_000_000):
        table[i % 1000] = table.get(i % 997, 0.0) + (i ^ 5) / (i + 1)
    x = torch.linspace(0, 1, 64 * 64, dtype=torch.float64).view(64, 64)
    for _ in range(8_000):
        x = torch.softmax(x @ x, -1) + x.sum(-1, keepdim=True) / 64 - x.mean()
    return time.process_time() - started


def cpu_seconds() -> float:
    """CPU seconds of this process, and of the child processes that have ended and been waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def read_budget(file: Path) -> float:
    """The number in a file whose other lines are empty or begin with ``#``.

    Raises:
        pytest.UsageError: The file cannot be read, or holds anything else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        (number,) = (line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#"))
        budget = float(number)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(
            f"--cpu-budget {file}: write one number, in yardsticks, on a line of its own"
        ) from error
    if not 0 < budget < float("inf"):
        raise pytest.UsageError(f"--cpu-budget {file} says {number}: write a positive number of yardsticks")
    return budget


class CpuSeconds:
    """The pytest plugin that counts. Every worker has one, and the first process has one that adds up all.

    Attributes:
        by_file: CPU seconds of the tests in each file, their fixtures included.
        yardsticks: Every yardstick taken in this session, in CPU seconds.
    """

    def __init__(self, budget: float) -> None:
        self.by_file: Counter[str] = Counter()
        self.yardsticks: list[float] = []
        self._budget = budget
        self._started = self._before = cpu_seconds()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """The first yardstick, in a process that runs tests."""
        if _runs_tests(session.config):
            self.yardsticks.append(yardstick())

    def pytest_collection_finish(self) -> None:
        """Start to charge time to tests."""
        self._before = cpu_seconds()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> None:
        """Charge the item with the time since the last report."""
        now = cpu_seconds()
        item.user_properties = [p for p in item.user_properties if p[0] != _PROPERTY]
        item.user_properties.append((_PROPERTY, now - self._before))
        self._before = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up what the reports carry, by file."""
        self.by_file[report.nodeid.partition("::")[0]] += dict(report.user_properties).get(_PROPERTY, 0.0)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Take the last yardstick. Workers send theirs to the first process, which decides."""
        if _runs_tests(session.config):
            self.yardsticks.append(yardstick())
        output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["yardsticks"] = self.yardsticks
        yield
        # The workers have ended, and their CPU seconds are known.
        if output is None and self._cost() > self._budget and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add a worker's yardsticks. A worker that crashed sends none."""
        self.yardsticks += getattr(node, "workeroutput", {}).get("yardsticks", [])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The slowest files, and what the session cost."""
        terminalreporter.section(f"CPU seconds: the {_SLOWEST} slowest files")
        for file, seconds in self.by_file.most_common(_SLOWEST):
            terminalreporter.write_line(f"{seconds:8.1f}  {file}")
        cost, unit = self._cost(), fmean(self.yardsticks)
        terminalreporter.write_line(
            f"{cost * unit:8.1f}  the session: {cost:.0f} yardsticks of {unit:.2f} s (of {len(self.yardsticks)}, "
            f"{min(self.yardsticks):.2f} to {max(self.yardsticks):.2f} s); the budget is {self._budget:g}"
        )
        if cost > self._budget:
            terminalreporter.write_line(
                "The session costs more than its budget. Make the slowest files cheaper, mark what is statistics "
                "`exhaustive`, or raise the budget and say why in the commit.",
                red=True,
            )

    def _cost(self) -> float:
        """CPU seconds of this process and of its workers, which have ended by now, in yardsticks."""
        return (cpu_seconds() - self._started) / fmean(self.yardsticks)


def _runs_tests(config: pytest.Config) -> bool:
    """Whether this process runs tests itself: a worker, or a session without workers."""
    return hasattr(config, "workerinput") or config.getoption("dist", "no") == "no"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option ``--cpu-budget``."""
    parser.addoption(
        "--cpu-budget", type=Path, metavar="FILE", help="fail if the session costs more yardsticks than FILE says"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start to count if a budget is given."""
    file: Path | None = config.getoption("cpu_budget")
    if file is not None:
        config.pluginmanager.register(CpuSeconds(read_budget(file)), "cpu-seconds")
