"""``ktonum audit``: check what was asked for, run it, and write the reports."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ktonum.auditing.plan import AuditPlan, AuditSettings, make_plan
from ktonum.errors import UsageError
from ktonum.results import CheckResult, Report, Verdict

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["AuditRequest", "audit_command"]

# How often results so far are saved, in seconds, for a machine that goes down in the middle.
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
        strict: Whether INCONCLUSIVE fails.
        timeout: Seconds a worker may take over an item; 0 for no limit.
    """

    settings: AuditSettings
    op: str
    workers: str = "auto"
    json: str | None = None
    html: str | None = None
    junit: str | None = None
    reproductions: str | None = None
    strict: bool = False
    timeout: float = 600.0

    def check(self) -> None:
        """Check what needs no work.

        Raises:
            UsageError: A file cannot be written, a number is none, or something needed is not installed.
        """
        if self.workers != "auto" and not self.workers.isdecimal():
            raise UsageError(
                f"-n {self.workers!r} is no number of workers: use auto, 0 for this process alone, or 1, 2, ..."
            )
        for option, path in (("--json", self.json), ("--html", self.html), ("--junit", self.junit)):
            if path is not None:
                _check_writable(option, Path(path))
        if self.reproductions is not None:
            _check_folder("--reproductions", Path(self.reproductions))
        if self.html is not None and importlib.util.find_spec("jinja2") is None:
            raise UsageError("--html needs jinja2, which is not installed: pip install 'ktonum[report]'")


def audit_command(request: AuditRequest) -> int:
    """Run an audit and report it.

    Returns:
        The exit status: 0 when it passed, 1 when it did not, 130 when it was interrupted.

    Raises:
        UsageError: Something was asked for that cannot be done; nothing was run.
    """
    from ktonum.auditing.gpu_slots import visible_gpus
    from ktonum.auditing.worker_process import resolve_device_kind

    started = time.monotonic()
    request.check()
    request.settings.check()
    folder = os.getcwd()
    if folder not in sys.path:
        # Before xdist is imported, which then takes sys.path for its workers.
        sys.path.insert(0, folder)
    device = resolve_device_kind(request.settings.device)
    if device == "cpu":
        # Before anything imports the kernels.
        os.environ["TRITON_INTERPRET"] = "1"
    plan = make_plan(request.settings, device, (Path(folder),))

    from ktonum.auditing.pytest_session import run_session, worker_count
    from ktonum.report.terminal import AuditView, make_console, print_summary

    gpus = len(visible_gpus()) if device == "cuda" else 0
    workers = worker_count(request.workers, plan, gpus, request.settings.profile)
    console = make_console()
    console.print(_headline(request, plan, workers, gpus), markup=False)
    saver = _Saver(request, plan)
    # Until the bar is on screen the workers are starting, which takes as long as importing torch.
    with _terminated_like_interrupted(), AuditView(console, len(plan.items)) as view:

        def on_result(result: CheckResult) -> None:
            view.show(result)
            saver.add(result)

        outcome = run_session(
            request.settings, plan, workers=workers, junit=request.junit, timeout=request.timeout, on_result=on_result
        )
    report = saver.finish(outcome.results, interrupted=outcome.interrupted)
    print_summary(
        console,
        report,
        standard=request.settings.standard,
        planned=len(plan.items),
        strict=request.strict,
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
        console.print(f"The session ended early (whole story in the report's details): {last}", markup=False)
    if outcome.interrupted:
        return 130
    decided = any(r.verdict is Verdict.PASS for r in report.results)
    return 0 if report.ok and decided and not (request.strict and report.inconclusive) else 1


class _Saver:
    """Writes the report: now and then while results come, and when they are complete."""

    def __init__(self, request: AuditRequest, plan: AuditPlan) -> None:
        self._request = request
        self._plan = plan
        self._results: list[CheckResult] = []
        self._saved = time.monotonic()

    def add(self, result: CheckResult) -> None:
        """Take in a result; save if the last time is a while ago."""
        self._results.append(result)
        if self._request.json is not None and time.monotonic() - self._saved >= _SAVE_EVERY:
            self._write_json(Report(tuple(self._results), self._description(interrupted=True)))
            self._saved = time.monotonic()

    def finish(self, results: tuple[CheckResult, ...], *, interrupted: bool) -> Report:
        """The report of all results, written to the files asked for."""
        from ktonum.report.environment import describe_environment

        # Only now that the workers are gone: it initialises CUDA in this process.
        environment = {**describe_environment(self._plan.device), **self._description(interrupted=interrupted)}
        report = Report(results, environment)
        self._write_json(report)
        if self._request.html is not None:
            from ktonum.report.html import write_html

            write_html(report, self._request.html, planned=len(self._plan.items), strict=self._request.strict)
        return report

    def _description(self, *, interrupted: bool) -> dict[str, Any]:
        settings = self._request.settings
        audit = {
            "op": self._request.op,
            "candidate": settings.candidate,
            "device": self._plan.device,
            "profile": settings.profile,
            "standard": settings.standard,
            "strict": self._request.strict,
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
        # By way of a second file: a crash while writing must not destroy what was saved before.
        path = path.resolve()
        part = path.with_name(f"{path.name}.part")
        report.to_json(part)
        part.replace(path)


def _check_writable(option: str, path: Path) -> None:
    folder = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: name a file")
    if not folder.is_dir():
        raise UsageError(f"{option} {path} cannot be written: there is no folder {folder}; create it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written: permission denied; name a file that you may write")


def _check_folder(option: str, path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path} is a file: name a folder")
    parent = path if path.exists() else path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{option} {path} cannot be made: there is no folder {parent}; create it first")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written: permission denied; name a folder that you may write")


def _write_reproductions(request: AuditRequest, plan: AuditPlan, report: Report, console: Console) -> None:
    """A script for each distinct failure, each reduced first; a line for each as it is written."""
    from ktonum.auditing.reduce.reproductions import Source, write_reproductions

    assert request.reproductions is not None  # see `audit_command`
    settings = request.settings
    source = Source(settings.targets[0], settings.candidate, os.getcwd(), settings.standard)
    cases = {item.case.name: item.case for item in plan.items}
    written = write_reproductions(
        report.failures, cases, source, Path(request.reproductions), timeout=request.timeout or None
    )
    for path, words in written:
        console.print(f"Written: {path} ({words})", markup=False, soft_wrap=True)


def _headline(request: AuditRequest, plan: AuditPlan, workers: int, gpus: int) -> str:
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
    """The command line without dtype and outputs, from which one for a single failure is made."""
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
    """SIGTERM, which is what a CI system sends, stops the audit like Ctrl-C: what was measured is written."""

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
