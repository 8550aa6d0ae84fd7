"""How a worker dies, and which verdict its item gets.

A worker dies in one of three ways:

- The candidate ends the process, for example by a segmentation fault. xdist tells the controller which item was
  running, and `handle_crash` gives that item the verdict ERROR.
- An item exceeds its time limit. `CrashTraces.limited` ends the worker, and the rest is as above.
- The candidate breaks the process's CUDA context, so that every later item would fail. `context_lost` notices. The
  worker reports its item and then ends itself with `end_worker`; `handle_crash` sees that the item has a result.

Each time xdist starts another worker, which goes on with the items that are left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

from ktonum.auditing.audit_process import AuditProcess
from ktonum.auditing.plan import PlannedItem
from ktonum.auditing.pytest_items import forget_in_junit, put_result
from ktonum.results import Cause

__all__ = ["CrashTrace", "CrashTraces", "context_lost", "end_worker", "handle_crash"]

# After these a process's CUDA context answers every call with an error.
_FATAL = (
    "an illegal memory access",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
    "an illegal instruction",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "uncorrectable ECC error",
    "the launch timed out",
    "cudaErrorIllegalAddress",
)


@dataclass(frozen=True)
class CrashTrace:
    """What a worker left behind.

    Attributes:
        cause: E.g. ``Fatal Python error: Segmentation fault``.
        stack: Of the main thread, the latest call first.
    """

    cause: str
    stack: str

    @classmethod
    def read(cls, folder: Path, worker: str) -> CrashTrace | None:
        """What `CrashTraces` wrote for ``worker``; None where it wrote nothing, for example because of `os._exit`."""
        file = _trace_file(folder, worker)
        text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        if not text:
            return None
        # The main thread is the last one; the others are xdist's and the watchdog. A list of extension modules follows.
        stack = text.partition("\n\nExtension modules")[0].rpartition("hread 0x")[2]
        return cls(text.splitlines()[0], "\n".join(stack.splitlines()[1:]))

    @property
    def text(self) -> str:
        """Cause and stack, for a reader."""
        return f"{self.cause}\n{self.stack}".rstrip()

    @property
    def timed_out(self) -> bool:
        """Whether the worker ended because its item exceeded the time limit."""
        return self.cause.startswith("Timeout")


class CrashTraces:
    """Has a worker leave its Python stack in the run's folder when it dies; does nothing in other processes."""

    def __init__(self, process: AuditProcess) -> None:
        self._process = process
        self._file: IO[str] | None = None

    def enable(self) -> None:
        """Leave a trace of every crash from now on, instead of on the terminal."""
        if self._process.worker:
            faulthandler.enable(self._opened())

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """End the worker, with a trace, unless the block ends within ``seconds``; 0 for no limit.

        A thread of the interpreter does that, because a hung kernel may never return to Python.
        """
        limited = bool(self._process.worker) and seconds > 0
        if limited:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._opened())
        try:
            yield
        finally:
            if limited:
                faulthandler.cancel_dump_traceback_later()

    def _opened(self) -> IO[str]:
        if self._file is None:
            self._file = _trace_file(self._process.folder, self._process.worker).open("w", encoding="utf-8")
        return self._file


def _trace_file(folder: Path, worker: str) -> Path:
    return folder / f"{worker}.trace"


def context_lost(text: str) -> bool:
    """Whether an error with this text leaves the process's CUDA context unusable.

    Where CUDA is in use, a synchronisation tells; it may also raise an error that nothing has reported yet.
    """
    if any(sign in text for sign in _FATAL):
        return True
    import torch

    initialized: Any = torch.cuda.is_initialized
    if not initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def end_worker() -> NoReturn:
    """End a worker whose CUDA context is lost.

    To be called when the reports of its item are sent, while xdist still counts the item as running: xdist then blames
    this item, which has a result, and no other item is lost.
    """
    os._exit(3)


def handle_crash(
    report: pytest.TestReport,
    item: PlannedItem,
    trace: CrashTrace | None,
    *,
    config: pytest.Config,
    has_result: bool,
    timeout: float,
) -> None:
    """Turn xdist's report of a dead worker into a verdict on the item that it was running.

    Args:
        report: The report; it is changed.
        item: The item.
        trace: What the worker left behind.
        config: The controller's.
        has_result: Whether the item's result arrived before the worker ended, see `end_worker`.
        timeout: The time limit in seconds.
    """
    if has_result:
        report.outcome, report.when, report.longrepr = "passed", "teardown", None
        forget_in_junit(config, report)
        return
    if trace is not None and trace.timed_out:
        cause, reason = Cause.HUNG, f"no verdict within the time limit of {timeout:g} s"
    else:
        cause, reason = Cause.DIED, trace.cause if trace else ""
    put_result(report, item.error(cause, reason, trace.text if trace else ""))
