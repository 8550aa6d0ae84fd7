"""Runs planned items in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from ktonum.auditing.plan import PlannedItem
from ktonum.auditing.worker_crashes import CrashTraces, context_lost
from ktonum.results import Cause, CheckResult, Verdict

__all__ = ["ItemRunner"]


class ItemRunner:
    """Runs the items of one process, each with one thread and within the time limit.

    Attributes:
        traces: Where this process leaves a trace when it dies.
        timeout: Seconds that an item may take in a worker; 0 for no limit.
        lost_in: The item in which this process lost its CUDA context; empty as long as it has not.
    """

    def __init__(self, traces: CrashTraces, timeout: float) -> None:
        self.traces = traces
        self.timeout = timeout
        self.lost_in = ""

    def run(self, item: PlannedItem) -> CheckResult:
        """The result of one item."""
        if self.lost_in:
            return item.error(
                Cause.NOT_RUN,
                f"an earlier item crashed CUDA in this process ({self.lost_in}); run with -n 1 so that workers restart",
            )
        with self.traces.limited(self.timeout), _one_thread():
            result = item.run()
        if (result.verdict is Verdict.ERROR or item.case.device == "cuda") and context_lost(
            f"{result.reason}\n{result.details}"
        ):
            self.lost_in = item.name
            if result.verdict is not Verdict.ERROR:
                result = replace(result, verdict=Verdict.ERROR, cause=Cause.CUDA_LOST, reason="", power=(), meets=())
        return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A sum that is split over threads depends on their number, and workers share the cores.

    On a GPU, too, because small tensors are measured on the CPU: with 16 workers of 32 threads each, blocks of a
    calibration that should take seconds had not ended after five minutes.
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
