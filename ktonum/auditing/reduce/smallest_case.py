"""The smallest case that still fails: dims are made smaller, and another seed is used if it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ktonum.auditing.in_process import audit_case
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.results import CheckResult, Verdict

__all__ = ["MOST_RUNS", "SmallestCase", "fails_with", "reduced", "smallest_case"]

#: The largest number of runs of the check in one reduction.
MOST_RUNS = 24
# Offsets of the seed, in the order in which they are tried.
_OFFSETS = (0, 1, 2)


@dataclass(frozen=True)
class SmallestCase:
    """The result of a reduction.

    Attributes:
        case: The smallest case found that fails; the given case if no smaller one fails.
        runs: The number of runs of the check.
        exhausted: Whether the search ended because no more runs were allowed.
    """

    case: Case
    runs: int
    exhausted: bool


def smallest_case(
    op: Op,
    case: Case,
    check: str,
    tensor: str,
    *,
    standard: str = "precise",
    on_smaller: Callable[[Case], None] | None = None,
) -> SmallestCase:
    """Reduce a case that fails, as long as the same check fails on the same tensor.

    Args:
        op: The op under audit.
        case: A case that fails.
        check: The check's name.
        tensor: The tensor's name; its context may differ.
        standard: The standard that decides.
        on_smaller: Called with each smaller case that fails.
    """

    def fails(smaller: Case) -> bool:
        failed = fails_with(audit_case(op, smaller, check, standard=standard), tensor)
        if failed and on_smaller is not None:
            on_smaller(smaller)
        return failed

    return reduced(case, fails)


def fails_with(result: CheckResult, tensor: str) -> bool:
    """Whether a result is a FAIL in the tensor of this name. With an empty name, any FAIL counts."""
    if result.verdict is not Verdict.FAIL:
        return False
    return not tensor or any(m.tensor == tensor for m in result.measurements if not m.within)


def reduced(case: Case, fails: Callable[[Case], bool], *, most_runs: int = MOST_RUNS) -> SmallestCase:
    """Make one dim smaller at a time, the largest first, until no smaller case fails or ``most_runs`` runs are used.

    A smaller case has other inputs, and may be right by luck. If no smaller size fails with the first seed, further
    seeds are tried.
    """
    runs = 0
    tried = {case.name}
    for offset in _OFFSETS:
        shrunk = True
        while shrunk:
            shrunk = False
            for smaller in _smaller(case, offset):
                if smaller.name in tried:
                    continue
                if runs == most_runs:
                    return SmallestCase(case, runs, True)
                tried.add(smaller.name)
                runs += 1
                if fails(smaller):
                    case, shrunk = smaller, True
                    break
    return SmallestCase(case, runs, False)


def _smaller(case: Case, offset: int) -> Iterator[Case]:
    """The case with one smaller dim: the largest dim first, and for each dim its smallest size first."""
    dims = case.point.dims
    for name, size in sorted(dims.items(), key=lambda item: -item[1]):
        for less in _sizes(size):
            point = replace(case.point, dims={**dims, name: less})
            yield replace(case, point=point, offset=offset)


def _sizes(size: int) -> list[int]:
    """1, a quarter, a half, and the last power of two plus 1, which leaves one element in an incomplete tile."""
    edge = 1 << max(0, (size - 2).bit_length() - 1)
    return sorted({1, size // 4, size // 2, edge + 1} & set(range(1, size)))
