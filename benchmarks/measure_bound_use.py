"""Which share of their derived tolerances do right and wrong reductions use?

    python benchmarks/measure_bound_use.py [--largest 21] [--write docs/bounds.md]

The reductions are sums, inner products, log-sum-exps and softmaxes of 2⁶, 2⁹, ..., 2²¹ terms, on a CPU.
`subjects/rounded_sums.py` carries out the additions in several orders. ``--write`` replaces the tables between the two
comments of the page. The exit status is 1 if a right reduction uses more than its tolerance or less than a thirtieth of
it, or if a wrong reduction uses no more than its tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from ktonum.bounds import PAIRWISE, SEQUENTIAL
from subjects.rounded_sums import DATA, OPS, STORAGES, Subject, one_by_one_in, to_tf32, uses

SHORTEST, STEP = 6, 3
#: The share of its tolerance that a right reduction may use.
LEAST, MOST = 1 / 30, 1.0
_BEGIN, _END = "<!-- measured -->", "<!-- end -->"


def right(largest: int) -> Iterator[tuple[str, list[float]]]:
    """For each op and storage the shares of all orders, data and lengths."""
    for op in OPS:
        for storage in STORAGES:
            shares = []
            for power in range(SHORTEST, largest + 1, STEP):
                for data in DATA if op in ("sum", "inner product") else ("zero mean",):
                    shares += uses(Subject(op, storage, 2**power, data)).values()
            yield f"{op} | {storage}", shares


def wrong(largest: int) -> Iterator[tuple[str, list[float]]]:
    """The same for defects. Accumulators of 16 bits add up to 2¹⁵ terms only: they take a step for each term."""
    for storage, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.bfloat16)):
        for op in ("sum", "inner product"):
            shares = []
            for power in range(SHORTEST, min(largest, 15) + 1, STEP):
                subject = Subject(op, storage, 2**power, "positive")
                shares += uses(subject, [SEQUENTIAL], accumulate=one_by_one_in(dtype)).values()
            yield f"{op}, accumulated in {str(dtype).removeprefix('torch.')} | {storage}", shares
    shares = []
    for power in range(SHORTEST, largest + 1, STEP):
        shares += uses(Subject("inner product", "fp32", 2**power), [PAIRWISE], operands=to_tf32).values()
    yield "inner product, operands of zero mean read as TF32 | fp32", shares


def table(rows: Sequence[tuple[str, list[float]]]) -> str:
    """Markdown: smallest and largest share."""
    lines = ["| what | storage | smallest | largest |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {min(shares):.3g} | {max(shares):.3g} |" for name, shares in rows)])


def main() -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--largest", type=int, default=21, help="the longest reduction's power of two")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    given = parser.parse_args()
    correct, defective = list(right(given.largest)), list(wrong(given.largest))
    page = f"{table(correct)}\n\n{table(defective)}"
    sys.stdout.write(f"{page}\n")
    if given.write is not None:
        text = given.write.read_text(encoding="utf-8")
        before, rest = text.split(_BEGIN)
        after = rest.split(_END)[1]
        given.write.write_text(f"{before}{_BEGIN}\n\n{page}\n\n{_END}{after}", encoding="utf-8")
    sound = all(LEAST <= s <= MOST for _, shares in correct for s in shares)
    return 0 if sound and all(s > MOST for _, shares in defective for s in shares) else 1


if __name__ == "__main__":
    sys.exit(main())
