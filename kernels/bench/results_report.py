"""The results of `ktonum bench` as a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ktonum.errors import UsageError
from ktonum.kernels.bench.contenders import LIMIT, contenders
from ktonum.kernels.bench.problem_sizes import GOALS, BenchmarkCase
from ktonum.kernels.bench.timing import Errors, Measured

__all__ = ["CaseResult", "draw_plot", "goal_lines", "print_case", "read_json", "write_json"]

SCHEMA = 1
_GROWTH = {"tokens": "T", "vocabulary": "V"}


@dataclass(frozen=True)
class CaseResult:
    """A case and its measurements, the limit's first."""

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
        captured = {c.name: c.captured for c in contenders()}
        rivals = [
            m.milliseconds
            for m in result.measured
            if m.milliseconds is not None
            and m.contender != LIMIT
            and not m.contender.startswith("ktonum")
            and captured.get(m.contender, False) == captured[goal.contender]
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
    """Write all results with their provenance."""
    rows = [
        {
            "case": asdict(r.case) | {"dtype": str(r.case.dtype).removeprefix("torch.")},
            "measured": [asdict(m) for m in r.measured],
        }
        for r in results
    ]
    document = {"schema": SCHEMA, "environment": dict(environment), "results": rows}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> tuple[list[CaseResult], dict[str, Any]]:
    """Results and environment that `write_json` wrote.

    Raises:
        UsageError: The file is not one of those.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}, where {SCHEMA} is known")
        results = []
        for row in document["results"]:
            typed = {"dtype": getattr(torch, row["case"]["dtype"]), "contenders": tuple(row["case"]["contenders"])}
            case = BenchmarkCase(**row["case"] | typed)
            measured = [
                Measured(**m | {"errors": None if m["errors"] is None else Errors(**m["errors"])})
                for m in row["measured"]
            ]
            results.append(CaseResult(case, tuple(measured)))
        return results, dict(document["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds no results of ktonum bench: {type(error).__name__}: {error}") from error


def draw_plot(results: Sequence[CaseResult], title: str, path: Path) -> None:
    """Draw time against memory for each case that has peers, and how both grow with tokens and with vocabulary.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'ktonum[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [r for r in results if r.case.group not in _GROWTH]
    grown = {g: [r for r in results if r.case.group == g] for g in _GROWTH}
    panels = max(1, len(cases) + 2 * sum(bool(found) for found in grown.values()))
    shape = (-(-panels // 3), min(3, panels))
    figure, axes = pyplot.subplots(*shape, figsize=(5 * shape[1], 4 * shape[0]), layout="constrained", squeeze=False)
    figure.suptitle(title)
    free = iter(axes.flat)
    for result in cases:
        axis = next(free)
        axis.set(title=f"{result.case.name}", xlabel="time / limit", ylabel="peak extra memory, GiB")
        for m in result.measured:
            if m.ratio is not None and m.peak_bytes is not None:
                axis.plot(m.ratio, m.peak_bytes / 2**30, "o")
                axis.annotate(m.contender, (m.ratio, m.peak_bytes / 2**30), xytext=(5, 5), textcoords="offset points")
        axis.axvline(1.0, linestyle=":", color="gray")
        axis.set_ylim(bottom=0)
    for group, letter in _GROWTH.items():
        if not grown[group]:
            continue
        for label, figure_of in (("ms", _milliseconds), ("peak extra memory, GiB", _gibibytes)):
            axis = next(free)
            axis.set(title=f"growth over {group}", xlabel=letter, ylabel=label)
            for name in dict.fromkeys(m.contender for r in grown[group] for m in r.measured):
                found = [(r.case.dims[letter], figure_of(own)) for r in grown[group] if (own := r.of(name)) is not None]
                points = [(x, y) for x, y in found if y is not None]
                axis.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
            axis.set_ylim(bottom=0)
            axis.legend()
    for axis in free:
        axis.set_axis_off()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _milliseconds(measured: Measured) -> float | None:
    return measured.milliseconds


def _gibibytes(measured: Measured) -> float | None:
    return None if measured.peak_bytes is None else measured.peak_bytes / 2**30
