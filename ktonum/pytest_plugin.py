"""The pytest plugin: ``pytest --ktonum`` audits the ops that ``pyproject.toml`` names, beside a project's own tests.

It loads with every pytest session, so it imports neither torch nor Triton, nor anything that does, until ``--ktonum``
is given. Items are ordinary pytest items: ``-n``, ``-k``, ``-x`` and ``--junitxml`` work on them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from ktonum.auditing.plan import DEVICES, AuditPlan, AuditSettings, declared_ops, make_plan
from ktonum.auditing.pytest_items import (
    PREFIX,
    ItemRunner,
    collect_items,
    crash_result,
    forget_in_junit,
    name_in_junit,
    result_of,
)
from ktonum.auditing.worker_process import AuditProcess
from ktonum.errors import UsageError
from ktonum.results import CheckResult, Report

__all__: list[str] = []

# xdist reruns the crasher until it gives up (loadfile, loadscope) or hangs (loadgroup) when a worker dies.
_CRASH_PROOF = ("no", "load", "worksteal")
# A candidate that crashes its process costs one worker an item; giving up would leave the other items without verdict.
_RESTARTS = 10_000
_RUN = pytest.StashKey["_AuditRun"]()
_PROCESS = pytest.StashKey[AuditProcess]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options ``--ktonum...``."""
    group = parser.getgroup("ktonum", "numerics audits")
    group.addoption("--ktonum", action="store_true", help="collect audit items: one for each case and check")
    group.addoption("--ktonum-only", action="store_true", help="collect audit items and no other tests")
    group.addoption(
        "--ktonum-op",
        action="append",
        default=[],
        metavar="TARGET",
        help="module, module:attr, path/file.py or path/file.py:attr; instead of [tool.ktonum] ops; repeatable",
    )
    group.addoption("--ktonum-candidate", metavar="TARGET", help="audit this instead of the ops' own candidate")
    group.addoption("--ktonum-dtype", metavar="NAMES", help="bf16, fp16, fp32, fp64, comma-separated (default: all)")
    group.addoption("--ktonum-device", default="auto", metavar="NAME", help=f"{', '.join(DEVICES)} (default: auto)")
    group.addoption("--ktonum-profile", default="quick", metavar="NAME", help="quick or full (default: quick)")
    group.addoption("--ktonum-standard", default="precise", metavar="NAME", help="precise or eager (default: precise)")
    group.addoption("--ktonum-strict", action="store_true", help="INCONCLUSIVE fails instead of being skipped")
    group.addoption(
        "--ktonum-select",
        action="append",
        default=[],
        metavar="TEXT",
        help="only items whose CASE::CHECK contains TEXT",
    )
    calibrating = "used by ktonum calibrate: "
    group.addoption("--ktonum-seeds", type=int, default=0, metavar="N", help=f"{calibrating}inputs drawn at a point")
    group.addoption("--ktonum-first-seed", type=int, default=0, metavar="N", help=f"{calibrating}their first offset")
    group.addoption("--ktonum-samples", default="", metavar="FILE", help=f"{calibrating}where samples are kept")
    group.addoption(
        "--ktonum-right",
        action="append",
        default=[],
        metavar="TARGET",
        help=f"{calibrating}a candidate held to be right; repeatable",
    )
    group.addoption(
        "--ktonum-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="end a worker that takes longer over an item, whose verdict is then ERROR (default: 600; 0: never)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose device and GPU before a conftest imports the kernels."""
    options = early_config.known_args_namespace
    if getattr(options, "ktonum", False) or getattr(options, "ktonum_only", False):
        _process(early_config, options.ktonum_device)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before xdist counts how many crashed workers it will replace."""
    if _asked(config) and getattr(config.option, "maxworkerrestart", 0) is None:
        config.option.maxworkerrestart = str(_RESTARTS)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start the run: read the settings, and check them.

    Raises:
        pytest.UsageError: A setting is none of those accepted.
    """
    option = config.option
    if not _asked(config):
        given = [n for n in ("op", "candidate", "dtype", "select") if getattr(option, f"ktonum_{n}")]
        if given:
            raise pytest.UsageError(f"--ktonum-{given[0]} does nothing by itself: add --ktonum")
        return
    named = [a.removeprefix(f"{PREFIX}::") for a in config.args if a.startswith(f"{PREFIX}::")]
    if named:
        config.args = [a for a in config.args if not a.startswith(f"{PREFIX}::")]
    if option.ktonum_only:
        config.args = []
    process = _process(config, option.ktonum_device)
    config.stash[_RUN] = _AuditRun(config, process, (*option.ktonum_select, *named))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the plan before workers start, so that a mistake is reported once and not by each of them.

    Raises:
        pytest.UsageError: There is nothing to audit, or an op or candidate cannot be loaded.
    """
    run = _run(session.config)
    if run is not None:
        run.make_plan()
        if run.process.worker and session.config.option.ktonum_only:
            # Not while other tests run here, too: their crashes belong where pytest's own faulthandler puts them.
            run.process.trace_crashes()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the audit's items to the collected tests; first, so that ``-k`` and ``-m`` see them."""
    run = _run(session.config)
    if run is not None:
        items += collect_items(session, run.plan, run.runner)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The audit's closing summary, below pytest's own."""
    run = _run(config)
    if run is None or not run.results:
        return
    from rich.console import Console

    from ktonum.report.terminal import print_summary

    terminalreporter.section("ktonum")
    writer = terminalreporter._tw
    console = Console(file=writer._file, width=max(60, writer.fullwidth), no_color=not writer.hasmarkup)
    print_summary(console, Report(tuple(run.results.values())), standard=run.settings.standard)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the run's folder."""
    process = config.stash.get(_PROCESS, None)
    if process is not None:
        process.finish()


class _AuditRun:
    """One session's audit: its settings, its plan and, where results arrive, the results."""

    def __init__(self, config: pytest.Config, process: AuditProcess, select: Sequence[str]) -> None:
        option = config.option
        self.config = config
        self.process = process
        self.results: dict[str, CheckResult] = {}
        self.runner = ItemRunner(
            process,
            standard=option.ktonum_standard,
            strict=option.ktonum_strict,
            time_limit=option.ktonum_timeout,
        )
        try:
            self.settings = AuditSettings(
                targets=tuple(option.ktonum_op) or declared_ops(config.rootpath),
                candidate=option.ktonum_candidate,
                dtypes=option.ktonum_dtype,
                device=option.ktonum_device,
                profile=option.ktonum_profile,
                standard=option.ktonum_standard,
                only=tuple(select),
                seeds=option.ktonum_seeds,
                first_seed=option.ktonum_first_seed,
                candidates=tuple(option.ktonum_right),
                samples=option.ktonum_samples,
            )
            self.settings.check()
        except UsageError as error:
            raise pytest.UsageError(f"ktonum: {error}") from error
        if not self.settings.targets:
            raise pytest.UsageError(
                f"ktonum: nothing to audit: name ops with --ktonum-op module:attr, or under [tool.ktonum] in "
                f'{config.rootpath / "pyproject.toml"} as ops = ["mykernels.audits"]'
            )
        dist = config.getoption("dist", "no")
        if dist not in _CRASH_PROOF:
            raise pytest.UsageError(
                f"ktonum: --dist {dist} does not survive a candidate that crashes its worker: use load or worksteal"
            )
        config.pluginmanager.register(self, "ktonum-audit-run")

    def make_plan(self) -> None:
        """List the items.

        Raises:
            pytest.UsageError: An op or candidate cannot be loaded, or nothing is left to run.
        """
        folders = (self.config.rootpath, self.config.invocation_params.dir)
        try:
            self.plan: AuditPlan = make_plan(self.settings, self.process.device, folders)
        except UsageError as error:
            raise pytest.UsageError(f"ktonum: {error}") from error

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result that a report carries, the first one of each item."""
        result = result_of(report)
        if result is not None:
            self.results.setdefault(report.nodeid, result)
        if report.nodeid.startswith(f"{PREFIX}::") and report.when != "teardown":
            name_in_junit(self.config, report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Turn the death of a worker into a verdict on the item that it was running, if that is one of ours."""
        if not crashitem.startswith(f"{PREFIX}::"):
            return
        if crashitem in self.results:
            # The worker ended itself after reporting the item that cost it its CUDA context.
            report.outcome, report.when, report.longrepr = "passed", "teardown", None
            forget_in_junit(self.config, report)
            return
        trace = self.process.crash_trace(report.node.gateway.id)  # xdist says whose crash it is
        if trace.startswith("Timeout"):
            reason = f"hung: no verdict within the time limit of {self.runner.time_limit:g} s"
        else:
            reason = f"the process died while the candidate ran{': ' + trace.splitlines()[0] if trace else ''}"
        crash_result(report, reason, trace, self.settings.standard)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """End a worker whose CUDA context is lost.

        Its reports are out, and xdist still counts the item as running: this one is blamed, and none is lost.
        """
        if self.runner.lost_in and self.process.worker:
            os._exit(3)


def _asked(config: pytest.Config) -> bool:
    return bool(config.option.ktonum or config.option.ktonum_only)


def _run(config: pytest.Config) -> _AuditRun | None:
    return config.stash.get(_RUN, None)


def _process(config: pytest.Config, device: str) -> AuditProcess:
    if _PROCESS not in config.stash:
        try:
            config.stash[_PROCESS] = AuditProcess.start(device if device in DEVICES else "cpu")
        except UsageError as error:
            raise pytest.UsageError(f"ktonum: {error}") from error
    return config.stash[_PROCESS]
