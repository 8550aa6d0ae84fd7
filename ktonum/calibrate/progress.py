"""The progress of a calibration: a bar on a terminal, and otherwise a line now and then."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ktonum.report.sentences import reason_words
from ktonum.results import CheckResult, Verdict

__all__ = ["SamplingView"]

# About this many lines are written to a log.
_LINES = 10


class SamplingView:
    """Shows the progress while errors are measured. It is a context manager, and removes the bar when it ends.

    Args:
        console: The console to print to.
        total: The number of blocks.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> SamplingView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, result: CheckResult) -> None:
        """Count a block as done, and print its result if something went wrong."""
        self._done += 1
        self._progress.update(self._task, advance=1, description="measuring")
        if result.verdict is not Verdict.INCONCLUSIVE:
            words = f"{result.verdict.value} {result.case}, {result.check}: {reason_words(result)}"
            self._console.print("\n".join(filter(None, (words, result.details.rstrip()))), markup=False, soft_wrap=True)
        before, now = ((self._done - i) * _LINES // self._total for i in (1, 0))
        if not self._console.is_terminal and now > before:
            words = f"{self._done} of {self._total} blocks measured, the last at {result.case}"
            self._console.print(words, markup=False, soft_wrap=True)
