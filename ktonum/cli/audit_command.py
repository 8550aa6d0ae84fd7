"""``ktonum audit``: check the options, run the audit, and write the reports."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.audit_settings import AuditSettings
from ktonum.auditing.plan import Plan, PlannedCheck
from ktonum.cli.option_checks import check_file, check_folder, check_workers
from ktonum.errors import UsageError
from ktonum.results import CheckResult, Report, Verdict

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["AuditRequest", "audit_command"]

# How often results so far are saved, in seconds: the machine may go down before the audit ends.
_SAVE_EVERY = 5.0


@dataclass(frozen=True)
class AuditRequest:
    """A command line of ``ktonum audit``.

    Attributes:
        settings: What to audit.
        op: The op as the user called it.
        workers: ``auto`` or a number.
        json, html, junit: Files to write; None for none.
        reproductions: A folder to write a script in for each failure; None for none.
    """

    settings: AuditSettings
    op: str
    workers: str = "auto"
    json: str | None = None
    html: str | None = None
    junit: str | None = None
    reproductions: str | None = None

    def check(self) -> None:
        """Check what can be checked without running anything.

        Raises:
            UsageError: An option is not among those accepted, a file cannot be written, or a package is missing.
        """
        self.settings.check()
        check_workers(self.workers)
        for option, path in (("--json", self.json), ("--html", self.html), ("--junit", self.junit)):
            if path is not None:
                check_file(option, Path(path))
        if self.reproductions is not None:
            check_folder("--reproductions", Path(self.reproductions))
        if self.html is not None and importlib.util.find_spec("jinja2") is None:
            raise UsageError("--html needs jinja2, which is not installed: pip install 'ktonum[report]'")


def audit_command(request: AuditRequest) -> int:
    """Run an audit and report it.

    Returns:
        The exit status: 0 when it passed, 1 when it did not, 130 when it was interrupted.

    Raises:
        UsageError: The request cannot be carried out; nothing was run.
    """
    started = time.monotonic()
    request.check()
    with AuditProcess.begin(request.settings.device, import_from=os.getcwd()) as process:
        plan = request.settings.make_plan(process.device)

        from ktonum.auditing.pytest_session import run_session, worker_count
        from ktonum.report.terminal import AuditView, make_console, print_summary

        workers = worker_count(request.workers, plan, len(process.gpus), request.settings.profile)
        console = make_console()
        console.print(_headline(request, plan, workers, len(process.gpus)), markup=False)
        saver = _Saver(request, plan)
        # Until the bar is on screen the workers are starting, which takes as long as importing torch.
        with _terminated_like_interrupted(), AuditView(console, len(plan.items)) as view:

            def on_result(result: CheckResult) -> None:
                view.show(result)
                saver.add(result)

            outcome = run_session(
                request.settings, plan, process, workers=workers, on_result=on_result, junit=request.junit
            )
    report = saver.finish(outcome.results, interrupted=outcome.interrupted)
    print_summary(
        console,
        report,
        standard=request.settings.standard,
        planned=len(plan.items),
        strict=request.settings.strict,
        command=_command(request),
        seconds=time.monotonic() - started,
    )
    for path in (request.json, request.html, request.junit):
        if path is not None:
            console.print(f"Written: {path}", markup=False, soft_wrap=True)
    if request.reproductions is not None and not outcome.interrupted:
        _write_reproductions(request, plan, report, console)
    if outcome.unfinished:
        last = outcome.unfinished.rstrip().splitlines()[-1]
        console.print(f"The session ended early: {last} (the full text is in the report's details)", markup=False)
    if outcome.interrupted:
        return 130
    decided = any(r.verdict is Verdict.PASS for r in report.results)
    return 0 if report.ok and decided and not (request.settings.strict and report.inconclusive) else 1


class _Saver:
    """Writes the report: every few seconds while results come, and at the end."""

    def __init__(self, request: AuditRequest, plan: Plan[PlannedCheck]) -> None:
        self._request = request
        self._plan = plan
        self._results: list[CheckResult] = []
        self._saved = time.monotonic()

    def add(self, result: CheckResult) -> None:
        """Add a result; save if some seconds have passed since the last time."""
        self._results.append(result)
        if self._request.json is not None and time.monotonic() - self._saved >= _SAVE_EVERY:
            self._write_json(Report(tuple(self._results), self._description(interrupted=True)))
            self._saved = time.monotonic()

    def finish(self, results: tuple[CheckResult, ...], *, interrupted: bool) -> Report:
        """The report of all results; it is also written to the files of the request."""
        from ktonum.report.environment import describe_environment

        # Not before the workers have ended: this initialises CUDA in this process.
        environment = {**describe_environment(self._plan.device), **self._description(interrupted=interrupted)}
        report = Report(results, environment)
        self._write_json(report)
        if self._request.html is not None:
            from ktonum.report.html import write_html

            write_html(report, self._request.html, planned=len(self._plan.items), strict=self._request.settings.strict)
        return report

    def _description(self, *, interrupted: bool) -> dict[str, Any]:
        settings = self._request.settings
        audit = {
            "op": self._request.op,
            "candidate": settings.candidate,
            "device": self._plan.device,
            "profile": settings.profile,
            "standard": settings.standard,
            "strict": self._request.settings.strict,
            "planned": len(self._plan.items),
            "interrupted": interrupted,
        }
        return {"audit": audit}

    def _write_json(self, report: Report) -> None:
        if self._request.json is None:
            return
        path = Path(self._request.json)
        if path.exists() and not path.is_file():
            report.to_json(path)  # a device or a pipe
            return
        # Through a second file: a crash while writing must not destroy what was saved before.
        path = path.resolve()
        part = path.with_name(f"{path.name}.part")
        report.to_json(part)
        part.replace(path)


def _write_reproductions(request: AuditRequest, plan: Plan[PlannedCheck], report: Report, console: Console) -> None:
    """Reduce each distinct failure, write a script for it, and print a line."""
    from ktonum.auditing.reduce.reproductions import Source, write_reproductions

    assert request.reproductions is not None  # see `audit_command`
    settings = request.settings
    source = Source(settings.targets[0], settings.candidate, os.getcwd(), settings.standard)
    cases = {item.case.name: item.case for item in plan.items}
    written = write_reproductions(
        report.failures, cases, source, Path(request.reproductions), timeout=request.settings.timeout or None
    )
    for path, words in written:
        console.print(f"Written: {path} ({words})", markup=False, soft_wrap=True)


def _headline(request: AuditRequest, plan: Plan[PlannedCheck], workers: int, gpus: int) -> str:
    from ktonum import __version__

    settings = request.settings
    where = f"{gpus} GPU{'s' * (gpus != 1)}" if plan.device == "cuda" else "CPU, Triton's interpreter"
    spread = f"{workers} worker{'s' * (workers != 1)}" if workers else "this process"
    candidate = f", candidate {settings.candidate}" if settings.candidate else ""
    return (
        f"ktonum {__version__}: {request.op}{candidate} on {where} ({spread}); profile {settings.profile}, standard "
        f"{settings.standard}: {plan.cases} cases, {len(plan.items)} checks"
    )


def _command(request: AuditRequest) -> str:
    """The command line without dtype and outputs; the report completes it for a single failure."""
    settings = request.settings
    words = ["ktonum", "audit", request.op]
    for option, value, usual in (
        ("--candidate", settings.candidate, None),
        ("--device", settings.device, "auto"),
        ("--profile", settings.profile, "quick"),
        ("--standard", settings.standard, "precise"),
    ):
        if value != usual:
            words += [option, str(value)]
    return shlex.join(words)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which CI systems send, stops the audit like Ctrl-C: results so far are written."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
