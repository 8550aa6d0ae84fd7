"""The results of `ktonum bench` as a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ktonum.errors import UsageError
from ktonum.kernels.benchmark import Measured
from ktonum.kernels.benchmark_cases import GOALS, BenchmarkCase
from ktonum.kernels.benchmark_contenders import LIMIT

__all__ = ["CaseResult", "draw_plot", "goal_lines", "print_case", "write_json"]

SCHEMA = 1
_GROWTH = {"tokens": "T", "vocabulary": "V"}


@dataclass(frozen=True)
class CaseResult:
    """A case and what was measured of it, the limit first."""

    case: BenchmarkCase
    measured: tuple[Measured, ...]

    def of(self, contender: str) -> Measured | None:
        """The contender's figures, None if it took no part."""
        return next((m for m in self.measured if m.contender == contender), None)


def print_case(result: CaseResult, console: Console) -> None:
    """One table: time, time over the limit's, peak extra memory, errors."""
    case = result.case
    dims = " x ".join(str(v) for v in case.dims.values())
    table = Table(
        title=f"{case.name}: B x T x H x V = {dims}, {str(case.dtype).removeprefix('torch.')}", title_justify="left"
    )
    table.add_column("")
    for name in ("ms", "/ limit", "spread", "GiB", "loss error", "gradient error", "gradient bias"):
        table.add_column(name, justify="right")
    for m in result.measured:
        if m.problem:
            table.add_row(m.contender, m.problem)
            continue
        errors = ("", "", "") if m.errors is None else (f"{v:.1e}" for v in asdict(m.errors).values())
        memory = "" if m.peak_bytes is None else f"{m.peak_bytes / 2**30:.2f}"
        table.add_row(m.contender, f"{m.milliseconds:.2f}", f"{m.ratio:.3f}", f"{m.spread:.3f}", memory, *errors)
    console.print(table)


def goal_lines(results: Sequence[CaseResult]) -> Iterator[tuple[bool, str]]:
    """Whether each goal was met, and a line that says so."""
    by_name = {r.case.name: r for r in results}
    for goal in GOALS:
        result = by_name.get(goal.case)
        measured = None if result is None else result.of(goal.contender)
        if result is None or measured is None or measured.milliseconds is None or measured.ratio is None:
            continue
        rivals = [
            m.milliseconds
            for m in result.measured
            if m.milliseconds is not None and m.contender != LIMIT and not m.contender.startswith("ktonum")
        ]
        errors = measured.errors
        found = {
            "time / limit": (measured.ratio, goal.ratio),
            "GiB": (None if measured.peak_bytes is None else measured.peak_bytes / 2**30, goal.gibibytes),
            "loss error": (None if errors is None else errors.loss, goal.loss),
            "gradient error": (None if errors is None else errors.gradient, goal.gradient),
            "gradient bias": (None if errors is None else abs(errors.bias), goal.bias),
            "time / fastest peer": (measured.milliseconds / min(rivals) if rivals else None, goal.against_peers),
        }
        for what, (value, wanted) in found.items():
            if value is not None and wanted is not None:
                met = value <= wanted
                sign = "met   " if met else "MISSED"
                yield met, f"{sign} {goal.case}, {goal.contender}: {what} {value:.3g}, goal {wanted:g}"


def write_json(results: Sequence[CaseResult], environment: Mapping[str, Any], path: Path) -> None:
    """Everything, with its provenance."""
    rows = [
        {
            "case": asdict(r.case) | {"dtype": str(r.case.dtype).removeprefix("torch.")},
            "measured": [asdict(m) for m in r.measured],
        }
        for r in results
    ]
    document = {"schema": SCHEMA, "environment": dict(environment), "results": rows}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def draw_plot(results: Sequence[CaseResult], title: str, path: Path) -> None:
    """Time against memory for the first case with errors, and growth over tokens and vocabulary where measured.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'ktonum[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    figure.suptitle(title)
    pareto = next((r for r in results if r.case.group == "goals"), None)
    if pareto is not None:
        axes[0].set(title=pareto.case.name, xlabel="time / limit", ylabel="peak extra memory, GiB")
        for m in pareto.measured:
            if m.ratio is not None and m.peak_bytes is not None:
                axes[0].plot(m.ratio, m.peak_bytes / 2**30, "o")
                axes[0].annotate(
                    m.contender, (m.ratio, m.peak_bytes / 2**30), xytext=(5, 5), textcoords="offset points"
                )
        axes[0].axvline(1.0, linestyle=":", color="gray")
        axes[0].set_ylim(bottom=0)
    for axis, (group, letter) in zip(axes[1:], _GROWTH.items(), strict=True):
        grown = [r for r in results if r.case.group == group]
        axis.set(title=f"growth over {group}", xlabel=letter, ylabel="ms (solid), GiB x 100 (dashed)")
        for name in dict.fromkeys(m.contender for r in grown for m in r.measured):
            points = [(r.case.dims[letter], found) for r in grown if (found := r.of(name)) and found.milliseconds]
            (line,) = axis.plot([x for x, _ in points], [m.milliseconds for _, m in points], "o-", label=name)
            memory = [(x, m.peak_bytes / 2**30 * 100) for x, m in points if m.peak_bytes is not None]
            axis.plot([x for x, _ in memory], [y for _, y in memory], "--", color=line.get_color())
        if grown:
            axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
