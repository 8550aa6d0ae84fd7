"""Do fresh errors exceed the levels of a fitted tail as often as the tail predicts, on the same dims and on new ones?

    python benchmarks/count_tail_exceedances.py [--fresh 10000] [--jobs 2] [--out docs/tolerances.md]

The script first fits a tail to errors of right implementations, as shares of their derived bounds, at many random dims.
Then it draws fresh seeds, half of them at these dims and half at new dims. It counts how many errors exceed the fitted
levels and the tolerance. ``--out`` replaces the table between two marks of the page. The exit status is 1 if an error
exceeded its tolerance.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import stats

from ktonum.calibrate.block_errors import sample_block
from ktonum.calibrate.seed_blocks import Block
from ktonum.calibrate.tails import describe_sample, exceedance, fit_tail
from ktonum.declare.cases import Case, Point, seed_of
from ktonum.declare.op import Op
from ktonum.kernels.audit.kto_op import OP as KTO
from ktonum.ready_ops.cross_entropy import OP as CROSS_ENTROPY
from ktonum.ready_ops.rms_norm import OP as RMS_NORM
from ktonum.tolerances.tables import Tail

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (1e-1, 1e-2, 1e-3)
MARKS = ("<!-- rates: written by benchmarks/count_tail_exceedances.py -->\n", "<!-- end of rates -->\n")
FALSE_ALARM = 1e-6
# The calibration: the number of dims, and of seeds at each of them.
_DIMS, _SEEDS = 200, 10
_REPLICAS = 400
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Subject:
    """A right implementation of an op in a dtype, its parameters, and the range from which each dim is drawn."""

    op: Op
    dtype: str
    candidate: str
    sizes: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """E.g. ``rms_norm, torch, fp32``."""
        return f"{self.op.name}, {self.candidate}, {self.dtype}"

    def block(self, number: int, first: int, seeds: int) -> Block:
        """Seeds at the dims of that number. Each number has dims of its own."""
        draw = random.Random(seed_of(f"{self.label} {number}"))
        dims = {name: draw.randint(*sizes) for name, sizes in self.sizes.items()}
        # The number is part of every seed, because two numbers may draw the same sizes.
        offset = 1_000_000 * (1 + number) + first
        case = Case(self.op.name, Point(dims, self.parameters), self.dtype, "cpu", offset)
        return Block(self.op.with_candidate(self.candidate), self.candidate, case, seeds)


SUBJECTS = (
    Subject(RMS_NORM, "fp32", "torch", {"N": (4, 40), "H": (24, 160)}, {"eps": 1e-6}),
    Subject(CROSS_ENTROPY, "bf16", "upcast", {"N": (4, 40), "V": (24, 300)}),
    Subject(
        KTO,
        "fp32",
        "torch",
        {"B": (2, 6), "T": (4, 20), "H": (8, 64), "V": (16, 120)},
        {"reference_from": "none", "average_log_prob": True},
    ),
)


def measure(task: tuple[int, int, int, int]) -> dict[str, list[float]]:
    """Shares of the bound in one block, by ``output/measure``.

    Args:
        task: Place of the subject in `SUBJECTS`, number of the dims, first seed, and number of seeds.
    """
    torch.set_num_threads(1)
    subject, number, first, seeds = task
    return {
        f"{s.output}/{s.measure}": list(s.shares) for s in sample_block(SUBJECTS[subject].block(number, first, seeds))
    }


@dataclass(frozen=True)
class Count:
    """How many fresh errors of one output in one measure exceed a level.

    Attributes:
        level: The predicted share of errors that exceed it.
        observed: How many exceeded it.
        fresh: How many errors there were.
        low, high: If the prediction is right, ``observed`` is between these in 95 of 100 such experiments.
    """

    level: float
    observed: int
    fresh: int
    low: int
    high: int

    @property
    def agrees(self) -> bool:
        """Whether the observed count is what the prediction allows."""
        return self.low <= self.observed <= self.high


class Calibration:
    """The tail of errors at several dims, and the tails that other calibrations would have found.

    For each of the others, dims are drawn again with replacement, and a tail is fitted to their errors.

    Args:
        by_dims: For each dims its errors.
    """

    def __init__(self, by_dims: Sequence[Sequence[float]]) -> None:
        self.sample = sorted(value for found in by_dims for value in found)
        self.tail, _ = fit_tail(self.sample)
        self._draw = np.random.default_rng(seed_of(f"bootstrap {len(self.sample)} {self.tail}"))
        self._others: list[tuple[Tail, int]] = []
        for _ in range(_REPLICAS):
            again = [v for i in self._draw.integers(len(by_dims), size=len(by_dims)) for v in by_dims[i]]
            self._others.append((fit_tail(sorted(again), replicas=0)[0], len(again)))

    def count(self, fresh: Sequence[float], level: float) -> Count:
        """How many of the fresh errors exceed the level, and how many may exceed it.

        Another calibration would have put the level elsewhere. This calibration's tail gives the rate of errors beyond
        that place.
        """
        reached = exceedance(self.tail, samples=len(self.sample), level=level)
        counts = []
        for tail, samples in self._others:
            other = exceedance(tail, samples=samples, level=level)
            counts.append(self._draw.binomial(len(fresh), min(1.0, self._rate(other))))
        low, high = np.quantile(counts, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        return Count(level, sum(value > reached for value in fresh), len(fresh), int(low), int(np.ceil(high)))

    def _rate(self, value: float) -> float:
        excess, tail = value - self.tail.threshold, self.tail
        return tail.exceeding / len(self.sample) * float(stats.genpareto.sf(excess, tail.shape, scale=tail.scale))


def experiments(subject: int, fresh: int, pool: Any) -> Iterator[tuple[str, list[str], list[Count], int]]:
    """For each measure of a subject: name, cells of its row, counts, and number of errors beyond the tolerance."""
    half = fresh // 2
    per_dims = -(-half // _DIMS)
    fitted = pool.map(measure, [(subject, n, 0, _SEEDS) for n in range(_DIMS)], chunksize=4)
    same = pool.map(measure, [(subject, n, _SEEDS, per_dims) for n in range(_DIMS)], chunksize=4)
    other = pool.map(measure, [(subject, _DIMS + n, 0, 1) for n in range(fresh - half)], chunksize=100)
    for name in fitted[0]:
        by_dims = [found[name] for found in fitted if name in found]
        drawn = [[v for found in part for v in found.get(name, ())] for part in (same, other)]
        calibration = Calibration(by_dims)
        described = describe_sample([calibration.sample], bound=1.0, false_alarm=FALSE_ALARM)
        beyond = sum(value > described.tolerance for part in drawn for value in part)
        decided = f"{described.tolerance:.2f}" if described.decided_by == "tail" else "1 (the bound)"
        counts = [calibration.count(part, level) for part in drawn for level in LEVELS]
        cells = [_cell(c) for c in counts]
        fit = described.tail
        total = sum(map(len, drawn))
        cells += [f"{fit.shape:+.2f}", f"{fit.fit:.2f}", f"{described.maximum:.2f}", decided, f"{beyond} of {total:,}"]
        yield name, cells, counts, beyond


def _cell(found: Count) -> str:
    words = f"{found.observed} ({found.low}–{found.high})"
    return words if found.agrees else f"**{words}**"


def table(fresh: int, jobs: int) -> tuple[str, int]:
    """The table in Markdown, and how many errors exceeded their tolerance."""
    columns = [f"{level:g}" for level in LEVELS]
    heading = ["measure", *(f"{c}, same dims" for c in columns), *(f"{c}, new dims" for c in columns)]
    heading += ["ξ", "p of the fit", "largest", "tolerance", "beyond it"]
    parts: list[str] = []
    compared = outside = beyond_all = 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for number, subject in enumerate(SUBJECTS):
            lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
            for name, cells, counts, beyond in experiments(number, fresh, pool):
                lines.append(f"| {name} | {' | '.join(cells)} |")
                compared += len(counts)
                outside += sum(not c.agrees for c in counts)
                beyond_all += beyond
            sizes = ", ".join(f"{k} in {low} … {high}" for k, (low, high) in subject.sizes.items())
            parts.append(f"`{subject.label}`, {sizes}:\n\n" + "\n".join(lines) + "\n")
            sys.stderr.write(f"{subject.label} done\n")
    closing = (
        f"{outside} of {compared} counts are outside their 95 % interval, where {0.05 * compared:.0f} would be by "
        f"chance; {beyond_all} errors are beyond a tolerance.\n"
    )
    return "\n".join([*parts, closing]), beyond_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fresh", type=int, default=10_000, help="fresh seeds of each implementation [10000]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None, help="write the table into this page, between the two marks")
    options = parser.parse_args(arguments)
    if options.fresh < 2 * _DIMS:
        parser.error(f"invalid --fresh {options.fresh}: use {2 * _DIMS} or more")
    if options.out is not None and any(mark not in options.out.read_text("utf-8") for mark in MARKS):
        parser.error(f"--out {options.out} lacks the marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    text, beyond = table(options.fresh, options.jobs)
    sys.stdout.write(text)
    if options.out is not None:
        before, _, rest = options.out.read_text("utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        options.out.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
