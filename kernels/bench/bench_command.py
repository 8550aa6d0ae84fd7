"""`ktonum bench`, once its command line is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ktonum.errors import UsageError
from ktonum.kernels.bench.contenders import contenders
from ktonum.kernels.bench.problem_sizes import chosen_cases
from ktonum.kernels.bench.results_report import CaseResult, draw_plot, goal_lines, print_case, read_json, write_json
from ktonum.kernels.bench.timing import measure_case

__all__ = ["BenchmarkRequest", "benchmark_command"]


@dataclass(frozen=True)
class BenchmarkRequest:
    """What the command line asks for.

    Attributes:
        cases: Names of cases or groups; empty for all.
        contenders: Names; empty for every one that is installed.
        rounds: Timed rounds of each contender.
        json, plot: Files to write, or None.
        files: Show the results in these files instead of measuring any; needs no GPU.
    """

    cases: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    rounds: int = 8
    json: str | None = None
    plot: str | None = None
    files: tuple[str, ...] = ()


def benchmark_command(request: BenchmarkRequest, environment: Mapping[str, Any]) -> int:
    """Measure, print each result as it comes, and write the files that were asked for.

    Returns:
        0. Whether goals were met is only printed, because they were set for one device.

    Raises:
        UsageError: There is no CUDA device, or a name is unknown.
    """
    cases = chosen_cases(request.cases)
    known = [c.name for c in contenders()]
    if unknown := [name for name in request.contenders if name not in known]:
        raise UsageError(f"unknown contender {unknown[0]!r}: use {', '.join(known)}")
    if request.rounds < 1:
        raise UsageError(f"--rounds {request.rounds}: use 1 or more")
    if request.files and (request.cases or request.contenders or request.json):
        raise UsageError("--show shows what is in its files: drop --case, --contender and --json")
    console = Console(highlight=False)
    results: list[CaseResult] = []
    titles: list[str] = []
    if request.files:
        for file in request.files:
            read, environment = read_json(Path(file))
            results += read
            titles.append(_title(environment))
            _introduce(environment, console)
            for result in read:
                print_case(result, console)
    elif not torch.cuda.is_available():
        raise UsageError(
            "a benchmark needs a CUDA device and there is none here: run it on a machine with one (an H100 has the "
            "memory for every case); `ktonum doctor` says what is missing"
        )
    else:
        titles.append(_title(environment))
        _introduce(environment, console)
        for case in cases:
            measured = measure_case(case, device=torch.device("cuda"), rounds=request.rounds, names=request.contenders)
            results.append(CaseResult(case, measured))
            print_case(results[-1], console)
            torch.cuda.empty_cache()
            # After every case, so that a run that is cut off leaves what it measured.
            if request.json is not None:
                write_json(results, environment, Path(request.json))
    for met, line in goal_lines(results):
        console.print(line, style=None if met else "bold")
    if request.plot is not None:
        draw_plot(results, "; ".join(dict.fromkeys(titles)), Path(request.plot))
    return 0


def _title(environment: Mapping[str, Any]) -> str:
    device, packages = environment["device"], environment["packages"]
    return f"{device['name']}, torch {packages.get('torch')}, {environment['date']}"


def _introduce(environment: Mapping[str, Any], console: Console) -> None:
    console.print(f"{_title(environment)}, commit {environment['commit']}; reference model given")
