"""A pytest session of its own for planned items: the caller's pytest configuration has no part in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.audit_settings import SessionSettings
from ktonum.auditing.plan import Plan
from ktonum.auditing.pytest_items import node_id
from ktonum.auditing.session_hooks import SessionHooks
from ktonum.results import Cause, CheckResult

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
class _Problems:
    """A pytest plugin that keeps what went wrong with the session itself."""

    found: list[str] = field(default_factory=list)

    def pytest_internalerror(self, excrepr: object) -> bool:
        self.found.append(str(excrepr))
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found.append(str(report.longrepr))


def run_session(
    settings: SessionSettings[Any],
    plan: Plan[Any],
    process: AuditProcess,
    *,
    workers: int,
    on_result: Callable[[CheckResult], None],
    junit: str | None = None,
) -> Outcome:
    """Run the plan's items, in this process (``workers`` = 0) or spread over workers.

    Whatever happens to workers or to the session, the results that came are in the outcome. An item without one, in a
    session that was not interrupted, has the verdict ERROR.

    Args:
        settings: What the plan was made from; workers make it from them again.
        plan: What to run.
        process: This process.
        workers: How many worker processes.
        on_result: Called with each result as it comes.
        junit: A file for pytest to write; None for none.
    """
    hooks = SessionHooks(settings, process, items=plan.items, on_result=on_result)
    problems = _Problems()
    with _own_environment():
        code = pytest.main(_arguments(process.folder, len(plan.items), workers, junit), plugins=[hooks, problems])
    interrupted = code == pytest.ExitCode.INTERRUPTED
    unfinished = (
        ""
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or interrupted
        else "\n".join(problems.found or [f"the session ended with pytest's exit status {int(code)}"])
    )
    results = []
    for item in plan.items:
        result = hooks.results.get(node_id(item))
        if result is None and not interrupted:
            result = item.error(Cause.NOT_RUN, "the session ended without its result", unfinished)
            on_result(result)
        if result is not None:
            results.append(result)
    return Outcome(tuple(results), interrupted, unfinished)


def _arguments(folder: Path, items: int, workers: int, junit: str | None) -> list[str]:
    """What pytest itself must know. Workers get these arguments, too, and load the plugin by its name."""
    (folder / "pytest.ini").write_text("[pytest]\njunit_suite_name = ktonum\n", encoding="utf-8")
    return [
        *("-c", str(folder / "pytest.ini"), f"--rootdir={folder}", "--noconftest"),
        *("-p", "xdist.plugin", "-p", "ktonum.pytest_plugin"),
        *("-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:warnings", "-p", "no:logging"),
        *("-n", str(workers), *(["--dist=worksteal"] if workers else [])),
        # Every item may cost a worker; all others must still get their verdict.
        f"--max-worker-restart={items + workers}",
        *([] if junit is None else [f"--junitxml={Path(junit).absolute()}"]),
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


def worker_count(asked: str, plan: Plan[Any], gpus: int, profile: str) -> int:
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
