"""Which tests find which defects? Seven judges get every planted defect in four dtypes.

    python benchmarks/defect_matrix.py [--out docs/defect_matrix.md] [--jobs 2]

This takes some minutes on a CPU. The judges and their sources are in `judges.py`. The defects are in
`subjects/mutants.py` (KTO), `subjects/small_defects.py` and `subjects/op_defects.py`. Every defect is a small edit of a
correct implementation. The judges get the results of the correct implementation, too: if a judge flags them, that is a
false alarm.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

from judges import JUDGES, Trial, relative_error
from ktonum.case.context import CaseContext
from ktonum.declare.cases import Point
from ktonum.declare.op import Op
from ktonum.kernels.audit.kto_op import OP as KTO
from rounding_floor import AtItsLimits
from subjects.mutants import DEFECTS, POINTS
from subjects.op_defects import BORDERLINE, OP_DEFECTS, OPS
from subjects.plain_kto import PlainKTO
from subjects.planted import ALL
from subjects.small_defects import LOSS_DEFECTS, NORM_DEFECTS
from subjects.small_ops import RMS_NORM, SOFTMAX_LOSS

ROOT = Path(__file__).resolve().parents[1]
#: The audit must flag defects larger than this many times the rounding floor.
FACTOR = 3.0
# The number of right implementations at their limits, in addition to the right candidate: see `rounding_floor`.
_AT_ITS_LIMITS = 8
# Suffixes of defects whose candidate is listed a second time, because another check must give another verdict.
_REPEATED = (", by differences", ", gradients")


@dataclass(frozen=True)
class Planted:
    """A wrong candidate and the right one that it was made from, at the same point."""

    name: str
    wrong: Op
    right: Op


@dataclass(frozen=True)
class Row:
    """The size of one defect in one dtype, and each judge's answer.

    Attributes:
        name: The defect's name.
        dtype: Short name of the dtype.
        size: The defect's error divided by the rounding floor; NaN if the candidate breaks.
        alone: The defect's error divided by that of the right implementation that it was planted in.
        flagged: For each judge whether it flags the defect; None if its rule is not about the dtype.
    """

    name: str
    dtype: str
    size: float
    alone: float
    flagged: tuple[bool | None, ...]


def planted_defects() -> tuple[Planted, ...]:
    """Every defect once, by name."""
    found = []
    for label, op, right, defects in (
        ("kto", KTO, PlainKTO, DEFECTS),
        ("softmax_loss", SOFTMAX_LOSS, SOFTMAX_LOSS.candidate, LOSS_DEFECTS),
        ("plain rms_norm", RMS_NORM, RMS_NORM.candidate, NORM_DEFECTS),
    ):
        for d in defects:
            if not d.name.endswith(_REPEATED):
                wrong = replace(op, candidate=d.candidate, dims=[d.point])
                found.append(Planted(f"{label}: {d.name}", wrong, replace(wrong, candidate=right)))
    for o in (*OP_DEFECTS, *BORDERLINE):
        point = min((p for p in OPS[o.op].points("quick") if o.shows(p)), key=lambda p: math.prod(p.dims.values()))
        wrong = replace(OPS[o.op], candidate=o.candidate, dims=[point])
        found.append(Planted(o.full_name, wrong, wrong.with_candidate("upcast")))
    return tuple(found)


def right_ops() -> tuple[Op, ...]:
    """Correct implementations, one op for each point. No judge should flag them."""

    def by_point(op: Op, points: Iterable[Point]) -> list[Op]:
        return [replace(op, dims=[point]) for point in points]

    ops = by_point(replace(KTO, candidate=PlainKTO), POINTS)
    for op in (SOFTMAX_LOSS, RMS_NORM):
        ops += by_point(op, op.points("quick"))
    for op in OPS.values():
        ops += by_point(op.with_candidate("upcast"), op.points("quick"))
    return tuple(ops)


def _context(op: Op, dtype: str) -> CaseContext:
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    return CaseContext(op, case)


def examine(defect: Planted, dtype: str) -> Row:
    """Measure a defect and ask every judge about it."""
    flagged = tuple(judge.flags(Trial(_context(defect.wrong, dtype))) for judge in JUDGES)
    return Row(defect.name, dtype, *sizes_of(defect, dtype), flagged)


def sizes_of(defect: Planted, dtype: str) -> tuple[float, float]:
    """`Row.size` and `Row.alone`, at the worst tensor."""
    context, right = _context(defect.wrong, dtype), _context(defect.right, dtype)
    actual = Trial(context).actual
    if actual is None:
        return math.nan, math.nan
    oracle, floors = context.oracle.tensors(), [right.result.tensors()]
    for i in range(_AT_ITS_LIMITS):
        with AtItsLimits(f"{right.case.name} {i}"):
            floors.append(right.evaluate().tensors())

    def size(candidates: Sequence[Mapping[str, Tensor]]) -> float:
        return max(
            relative_error(t, oracle[name], *(c[name] for c in candidates))
            for name, t in actual.items()
            if name in floors[0]
        )

    return size(floors), size(floors[:1])


def _examine_indexed(task: tuple[int, str]) -> Row:
    torch.set_num_threads(1)
    return examine(planted_defects()[task[0]], task[1])


def _alarms_indexed(task: tuple[int, str]) -> Row:
    torch.set_num_threads(1)
    op = right_ops()[task[0]]
    flagged = tuple(judge.flags(Trial(_context(op, task[1]))) for judge in JUDGES)
    return Row(_context(op, task[1]).case.name, task[1], 1.0, 1.0, flagged)


def _spread(function: object, count: int, jobs: int) -> list[Row]:
    tasks = [(i, dtype) for i in range(count) for dtype in ALL]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        rows = []
        for row in pool.imap(function, tasks):  # type: ignore[arg-type]
            rows.append(row)
            sys.stderr.write(f"\r{len(rows)} of {len(tasks)}")
    sys.stderr.write("\n")
    return rows


def document(rows: Sequence[Row], alarms: Sequence[Row]) -> str:
    """The page."""
    names = list(dict.fromkeys(row.name for row in rows))
    by_key = {(row.name, row.dtype): row for row in rows}
    missed = missed_defects(rows)
    lucky = [r for r in rows if r.size <= FACTOR < r.alone and not r.flagged[0]]
    lines = [
        "# Which tests find which defects",
        "",
        "This page compares how many faults of kernels this audit finds with how many other tests find, for everybody "
        "who chooses a test. Words are explained in the [glossary](glossary.md).",
        "",
        f"It is written by `python benchmarks/defect_matrix.py`, on a CPU: {len(names)} "
        "[planted defects](glossary.md#planted-defect), each a small edit of a correct implementation, in "
        f"{len(ALL)} dtypes, and {len(JUDGES)} judges that look at each of them.",
        "",
        "| judge | rule |",
        "|---|---|",
        *(f"| {judge.name} | {judge.source} |" for judge in JUDGES),
        "",
        "How to read the tables:",
        "",
        "- All judges but gradcheck see the same outputs and gradients, under an upstream gradient that is not one. "
        "Most of the tests that they come from look at less.",
        "- gradcheck is not asked about cases whose gradient is not the derivative of the loss, such as those of KTO "
        "with its detached reference point.",
        "- Most of the defects are those of the audit's own tests, which require that it flags them. So these rows say "
        "something about the other judges only.",
        f"- {len(BORDERLINE)} defects count roundings in their names. They were not chosen in this way, and show how "
        "small a defect the audit can see.",
        "",
        f"## Defects that exceed {FACTOR:g} times the rounding floor",
        "",
        "The size of a defect is its error divided by the rounding floor, in norm or at the worst element, whichever "
        "is larger. The floor is the largest error of these right implementations in the same dtype, and at least one "
        "rounding:",
        "",
        "- the implementation that the defect was planted in;",
        f"- {_AT_ITS_LIMITS} implementations that take the same formula to its limits: they add sums and products one "
        "by one, and their functions are wrong by up to what a library's functions may be wrong by "
        "(`rounding_floor.py`).",
        "",
        "The first of these alone is not enough: in float64 it repeats the oracle operation by operation. Memory that "
        "a defect leaves unwritten holds what was there before, so those rows change from run to run.",
        "",
        *_table(row for row in rows if row.size > FACTOR),
        "",
        f"## Defects within {FACTOR:g} times the floor",
        "",
        "Some of these defects leave the measured results right: inputs are overwritten, strides are ignored, memory "
        "is read past the end, or results change from run to run. The others are hidden, wholly or nearly, by rounding "
        "to the dtype.",
        "",
        *_table(row for row in rows if row.size <= FACTOR),
        "",
        "## Defects that break",
        "",
        "These defects raise an exception, or an output or a gradient is missing.",
        "",
        *_table(row for row in rows if math.isnan(row.size)),
        "",
        "## False alarms",
        "",
        "The table counts correct implementations that a judge flags. If a judge flags many of these, it says little "
        "that it also flags defects.",
        "",
        *_table(alarms),
        "",
        "## Misses: defects above the floor that the audit does not flag",
        "",
        *(f"- {r.name}, {r.dtype}, size {_size(r.size)}" for r in missed),
        *([] if missed else ["Nothing."]),
        "",
        "The following defects pass, too. Compared only with the error of the implementation that they were planted "
        f"in, they would be beyond {FACTOR:g} times it:",
        "",
        *(f"- {r.name}, {r.dtype}: {_size(r.alone)} times that, {_size(r.size)} times the floor" for r in lucky),
        "",
        "## Every defect",
        "",
        f"Each cell has one mark or size for each dtype, in the order {', '.join(ALL)}. `F`: flagged. `·`: passed. "
        "`-`: the judge's rule is not about this dtype.",
        "",
        "| defect | size | " + " | ".join(judge.name for judge in JUDGES) + " |",
        "|---|---|" + "---|" * len(JUDGES),
    ]
    for name in names:
        found = [by_key[name, dtype] for dtype in ALL]
        sizes = ", ".join(_size(r.size) for r in found)
        marks = ["".join(_MARKS[r.flagged[i]] for r in found) for i in range(len(JUDGES))]
        lines.append(f"| {name} | {sizes} | " + " | ".join(f"`{m}`" for m in marks) + " |")
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Row]) -> list[str]:
    """For each judge and dtype: how many rows it flags, of those that its rule is about."""
    listed = list(rows)
    lines = ["| flagged by | " + " | ".join(ALL) + " |", "|---|" + "---|" * len(ALL)]
    for i, judge in enumerate(JUDGES):
        cells = [_share([r.flagged[i] for r in listed if r.dtype == dtype]) for dtype in ALL]
        lines.append(f"| {judge.name} | " + " | ".join(cells) + " |")
    return lines


def missed_defects(rows: Sequence[Row]) -> list[Row]:
    """Rows of defects that exceed the floor and that the audit passed."""
    return [r for r in rows if r.size > FACTOR and not r.flagged[0]]


_MARKS = {True: "F", False: "·", None: "-"}


def _share(answers: Sequence[bool | None]) -> str:
    given = [a for a in answers if a is not None]
    return f"{sum(given)} of {len(given)}" if given else "–"


def _size(size: float) -> str:
    return "breaks" if math.isnan(size) else "∞" if math.isinf(size) else f"{size:.2g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "defect_matrix.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    rows = _spread(_examine_indexed, len(planted_defects()), options.jobs)
    alarms = _spread(_alarms_indexed, len(right_ops()), options.jobs)
    options.out.write_text(document(rows, alarms), encoding="utf-8")
    missed = missed_defects(rows)
    for row in missed:
        sys.stdout.write(f"not flagged: {row.name}, {row.dtype}, size {_size(row.size)}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
