"""An audit on the terminal: a line for each verdict, a progress bar if the output is a terminal, and a summary."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ktonum.report.power_tables import HEADLINES, blind_spots, power_rows, weakest_power
from ktonum.report.sentences import measured, place, reason_words, sizes_words
from ktonum.report.summary import ending, findings, inconclusive_reasons, matrix, standards
from ktonum.results import CheckResult, Report, Verdict

__all__ = ["AuditView", "make_console", "print_summary", "verdict_line"]

_STYLES = {
    "PASS": "green",
    "FAIL": "bold red",
    "ERROR": "bold magenta",
    "INCONCLUSIVE": "yellow",
    "vacuous": "bold red",
}
# The width for log files.
_LOG_WIDTH = 120


def make_console() -> Console:
    """A console that writes to standard output even while pytest captures the output of candidates."""
    file, terminal = sys.stdout, sys.stdout.isatty()
    try:
        # A character that the encoding does not have must not end an audit.
        file = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)
    except (OSError, ValueError):
        pass  # Standard output is not a real file, for example because a test captures it.
    width = None if terminal or "COLUMNS" in os.environ else _LOG_WIDTH
    return Console(file=file, width=width, highlight=False, soft_wrap=False)


class AuditView:
    """Shows an audit while it runs. It is a context manager, and removes the progress bar at its end.

    Args:
        console: Where to print.
        total: The number of expected verdicts.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
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
        self._failed = 0

    def __enter__(self) -> AuditView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, result: CheckResult) -> None:
        """Print a verdict and move the bar."""
        line = verdict_line(result)
        if self.console.is_terminal:
            self.console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            self.console.print(line, soft_wrap=True)
        self._failed += result.failed
        words = f"[bold red]{self._failed} failed" if self._failed else "auditing"
        self._progress.update(self._task, advance=1, description=words)


def verdict_line(result: CheckResult) -> Text:
    """Verdict, check, dtype, worst measurement, power and case in one line. Without a PASS or a number, the reason."""
    word = "vacuous" if result.vacuous else result.verdict.value
    parts = result.parts
    line = Text()
    line.append(f"{word:<12} ", style=_STYLES[word])
    line.append(f"{result.check:<18} {parts.dtype:<4} ")
    if result.verdict is Verdict.PASS and not result.vacuous:
        words = [measured(result), f"flags {weakest_power(result)}"]
    elif result.verdict is Verdict.FAIL and result.worst is not None:
        others = f"meets {', '.join(result.meets)}" if result.meets else "meets no standard"
        words = [f"{measured(result)}{place(result.worst)}", others]
    else:
        words = [reason_words(result).partition("\n")[0]]
    line.append("  ".join(w for w in words if w))
    tail = f"{parts.op}[{parts.sizes}]" if parts.op else sizes_words(result)
    tail += "" if parts.distribution == "normal" else f"-{parts.distribution}"
    line.append(f"  {tail}", style="dim")
    return line


def print_summary(
    console: Console,
    report: Report,
    *,
    standard: str,
    planned: int | None = None,
    strict: bool = False,
    command: str = "",
    seconds: float | None = None,
) -> None:
    """Print the summary: failures and how to run one again, then the tables, and last the outcome in one sentence.

    Args:
        console: Where to print.
        report: The results.
        standard: The standard that decided.
        planned: The number of expected results; None for the number of results in the report.
        strict: Whether INCONCLUSIVE fails the audit.
        command: The audit's command line. A command for a single failure is made from it; empty for no such command.
        seconds: Wall time of the audit.
    """
    results = report.results
    if results:
        _print_findings(console, results, command)
        _print_matrix(console, results)
        _print_power(console, results)
        for name, words in standards(results):
            decides = " (it decides)" if name == standard else ""
            console.print(Text.assemble((f"Standard {name}", "bold"), f"{decides}: {words}."))
        reasons = inconclusive_reasons(results)
        if reasons:
            console.print()
            console.print(Text("Could not tell:", style="bold yellow"))
            for reason in reasons:
                console.print(Padding(Text(reason), (0, 0, 0, 2), expand=False))
    console.print()
    ended = ending(report, planned=len(results) if planned is None else planned, strict=strict)
    took = "" if seconds is None else f" {seconds:.1f} s."
    console.print(Text(f"{ended.sentence}{took}", style="bold green" if ended.passed else "bold red"))


def _print_matrix(console: Console, results: Sequence[CheckResult]) -> None:
    found = matrix(results)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("check")
    for dtype in found.dtypes:
        table.add_column(dtype)
    for check, cells in found.rows:
        table.add_row(check, *(Text(text, style=_STYLES.get(verdict, "")) for text, verdict in cells))
    console.print()
    console.print(Text("Number of cases with each verdict:", style="bold"))
    console.print(table)


def _print_power(console: Console, results: Sequence[CheckResult]) -> None:
    rows = power_rows(results, kinds=HEADLINES)
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    dtypes = matrix(results).dtypes
    for heading in ("check", "defect", *dtypes):
        table.add_column(heading)
    for row in rows:
        cells = dict(row.cells)
        table.add_row(row.check, row.defect, *(Text(cells.get(d, "")) for d in dtypes))
    console.print()
    title = (
        "Would have been flagged: the smallest planted defect, as a share of the values; median over tensors (worst)"
    )
    console.print(Text(title, style="bold"))
    console.print(table)
    spots = blind_spots(results)
    if spots:
        console.print()
        console.print(
            Text("Would not have been flagged: planted defects, and in how many tensors they were missed", style="bold")
        )
        blind = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for spot in spots:
            blind.add_row(spot.check, spot.words)
        console.print(blind)
    console.print()


def _print_findings(console: Console, results: Sequence[CheckResult], command: str) -> None:
    found = findings(results)
    if not found:
        return
    console.print()
    console.print(Text("What is wrong:", style="bold red"))
    for finding in found:
        console.print(Padding(Text(finding.headline), (0, 0, 0, 2), expand=False))
        for line in finding.lines:
            console.print(Padding(Text(line), (0, 0, 0, 6), expand=False))
    if command:
        example = found[0].example
        dtype = example.parts.dtype
        console.print("To run one failure again:")
        line = f"  {command} --dtype {dtype} --only {shlex.quote(f'{example.case}::{example.check}')}"
        console.print(Text(line), soft_wrap=True)
