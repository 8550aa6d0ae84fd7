"""An audit as a pytest session of its own: nothing of the caller's pytest configuration takes part in it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ktonum.auditing.plan import AuditPlan, AuditSettings
from ktonum.auditing.pytest_items import PREFIX, result_of
from ktonum.results import CheckResult, Verdict

__all__ = ["Outcome", "available_cores", "run_session", "worker_count"]

# Compiling kernels is most of a quick audit's time on a GPU, and runs on the host's cores.
_QUICK_PER_GPU = 8
# Read by pytest from the environment, and none of the audit's business.
_FOREIGN = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")


@dataclass
class Outcome:
    """What a session came to.

    Attributes:
        results: In the plan's order, whatever order they came in.
        interrupted: It was stopped from outside.
        unfinished: Why it ended early for another reason; empty when it did not.
    """

    results: tuple[CheckResult, ...] = ()
    interrupted: bool = False
    unfinished: str = ""


@dataclass
class _Collector:
    """The pytest plugin that takes in results as they arrive."""

    on_result: Callable[[CheckResult], None]
    results: dict[str, CheckResult] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = result_of(report)
        if result is not None and report.nodeid not in self.results:
            self.results[report.nodeid] = result
            self.on_result(result)

    def pytest_internalerror(self, excrepr: object) -> bool:
        self.problems.append(str(excrepr))
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.problems.append(str(report.longrepr))


def run_session(
    settings: AuditSettings,
    plan: AuditPlan,
    *,
    workers: int,
    junit: str | None,
    timeout: float,
    on_result: Callable[[CheckResult], None],
) -> Outcome:
    """Run the plan's items, in this process (``workers`` = 0) or spread over workers.

    Whatever happens to workers or to the session, the results that came are in the outcome. An item without one, in a
    session that was not interrupted, has the verdict ERROR.
    """
    collector = _Collector(on_result)
    with tempfile.TemporaryDirectory(prefix="ktonum-session-") as folder, _own_environment():
        code = pytest.main(_arguments(settings, plan, Path(folder), workers, junit, timeout), plugins=[collector])
    interrupted = code == pytest.ExitCode.INTERRUPTED
    unfinished = (
        ""
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or interrupted
        else "\n".join(collector.problems or [f"the session ended with pytest's exit status {int(code)}"])
    )
    results = []
    for item in plan.items:
        result = collector.results.get(f"{PREFIX}::{item.name}")
        if result is None and not interrupted:
            reason = "not run: the session ended before"
            result = CheckResult(
                item.case.name, item.check, Verdict.ERROR, reason=reason, details=unfinished, standard=settings.standard
            )
            on_result(result)
        if result is not None:
            results.append(result)
    return Outcome(tuple(results), interrupted, unfinished)


def _arguments(
    settings: AuditSettings, plan: AuditPlan, folder: Path, workers: int, junit: str | None, timeout: float
) -> list[str]:
    (folder / "pytest.ini").write_text("[pytest]\njunit_suite_name = ktonum\n", encoding="utf-8")
    given: dict[str, Any] = {
        "--ktonum-candidate": settings.candidate,
        "--ktonum-dtype": settings.dtypes,
        "--ktonum-device": plan.device,
        "--ktonum-profile": settings.profile,
        "--ktonum-standard": settings.standard,
        "--ktonum-timeout": timeout,
        "--ktonum-seeds": settings.seeds or None,
        "--ktonum-first-seed": settings.first_seed or None,
        "--ktonum-samples": settings.samples or None,
        "--rootdir": folder,
        "--junitxml": None if junit is None else Path(junit).absolute(),
        # Every item may cost a worker; all others must still get their verdict.
        "--max-worker-restart": len(plan.items) + workers,
        "--dist": "worksteal" if workers else None,
    }
    return [
        "--ktonum-only",
        *(f"--ktonum-op={target}" for target in settings.targets),
        *(f"--ktonum-select={text}" for text in settings.only),
        *(f"--ktonum-right={target}" for target in settings.candidates),
        *(f"{option}={value}" for option, value in given.items() if value is not None),
        *("-n", str(workers), "-c", str(folder / "pytest.ini"), "--noconftest"),
        *("-p", "xdist.plugin", "-p", "ktonum.pytest_plugin"),
        *("-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:warnings", "-p", "no:logging"),
    ]


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Without the caller's pytest options and plugins, here and in the workers, which inherit the environment."""
    kept = dict(os.environ)
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def worker_count(asked: str, plan: AuditPlan, gpus: int, profile: str) -> int:
    """How many workers ``-n`` asks for: for ``auto`` by GPUs, or one for each core, and no more than cases.

    A GPU gets one worker at production sizes, which fill its memory, and `_QUICK_PER_GPU` in the quick profile. Never
    0 for ``auto``: a candidate that takes its process down must not take the audit along.
    """
    if asked != "auto":
        return int(asked)
    per_gpu = _QUICK_PER_GPU if profile == "quick" else 1
    wanted = min(gpus * per_gpu, available_cores()) if plan.device == "cuda" else available_cores()
    return max(1, min(wanted, plan.cases))


def available_cores() -> int:
    """Physical cores that this process may use, as far as the system says."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        allowed = len(cores) if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        allowed = len(cores)
    return max(1, min(len(cores), allowed))
