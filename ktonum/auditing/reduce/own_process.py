"""Reduces a failing case in a separate process, because the candidate may crash or hang at another size.

The process prints each smaller case as soon as it finds it. After a crash, the last printed case is the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

from ktonum.auditing.audit_process import prepare_environment
from ktonum.declare.cases import Case

__all__ = ["Source", "reduce_elsewhere"]

_DONE = "done"
# Begins the lines of the reduction, because candidates may print, too.
_MARK = "ktonum-reduction "


@dataclass(frozen=True)
class Source:
    """Where an op under audit comes from, and the standard that decides.

    Attributes:
        target: ``module:attr`` or ``path/file.py:attr``.
        candidate: The target that replaces the op's candidate; None if nothing replaces it.
        folder: The folder in which modules are looked up.
        standard: ``precise`` or ``eager``.
    """

    target: str
    candidate: str | None
    folder: str
    standard: str


def reduce_elsewhere(
    source: Source, case: Case, check: str, tensor: str, *, timeout: float | None = None
) -> tuple[Case, str]:
    """The smallest case found that fails in the same way, and a phrase that says how the search ended.

    Args:
        source: The op.
        case: A case that fails.
        check: The check that fails.
        tensor: The tensor that fails.
        timeout: Seconds until the search counts as hung; None for no limit.
    """
    task = {"source": vars(source), "case": _record(case), "check": check, "tensor": tensor}
    ended = ""
    try:
        command = [sys.executable, "-m", "ktonum.auditing.reduce.own_process"]
        done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, timeout=timeout)
        output = done.stdout
    except subprocess.TimeoutExpired as hung:
        output = hung.stdout.decode() if isinstance(hung.stdout, bytes) else hung.stdout or ""
        ended = f"the search for a smaller case hung for {timeout:g} s"
    told = [json.loads(line.removeprefix(_MARK)) for line in output.splitlines() if line.startswith(_MARK)]
    smaller = [t for t in told if _DONE not in t]
    smallest = _case(case, smaller[-1]) if smaller else case
    finished = next((t[_DONE] for t in told if _DONE in t), None)
    if finished is None:
        return smallest, ended or "the search for a smaller case ended early, because its process died"
    return smallest, finished


def _record(case: Case) -> dict[str, Any]:
    point = case.point
    return {
        "op": case.op,
        "dims": dict(point.dims),
        "parameters": dict(point.parameters),
        "distribution": point.distribution,
        "dtype": case.dtype,
        "device": case.device,
        "offset": case.offset,
    }


def _case(like: Case, record: dict[str, Any]) -> Case:
    """``like`` at the dims and offset of a record."""
    return replace(like, point=replace(like.point, dims=record["dims"]), offset=record["offset"])


def _main() -> None:
    """Read a task from standard input, reduce its case, and print each smaller case that fails as a line of JSON."""
    task = json.load(sys.stdin)
    given = task["case"]
    prepare_environment(given["device"])

    import torch

    from ktonum.auditing.op_loading import load_op
    from ktonum.auditing.reduce.smallest_case import smallest_case
    from ktonum.declare.cases import Point

    torch.set_num_threads(1)  # as in an audit
    source = Source(**task["source"])
    op = load_op(source.target, candidate=source.candidate, folder=source.folder)
    point = Point(given["dims"], given["parameters"], given["distribution"])
    case = Case(given["op"], point, given["dtype"], given["device"], given["offset"])

    def tell(record: dict[str, Any]) -> None:
        sys.stdout.write(f"{_MARK}{json.dumps(record)}\n")
        sys.stdout.flush()

    found = smallest_case(
        op, case, task["check"], task["tensor"], standard=source.standard, on_smaller=lambda c: tell(_record(c))
    )
    end = "no more runs are allowed" if found.exhausted else "no smaller case fails"
    tell({_DONE: f"reduced in {found.runs} run{'s' * (found.runs != 1)}: {end}"})


if __name__ == "__main__":
    _main()
