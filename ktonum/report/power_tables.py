"""The planted defects of an audit in words and small tables. Like `ktonum.report.summary`, it needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ktonum.report.summary import checks_of, dtypes_of
from ktonum.results import CheckResult, Power, Verdict

__all__ = ["BlindSpots", "PowerRow", "blind_spots", "flagged_from", "power_rows", "weakest_power"]

#: The two kinds of defects that the terminal shows. It has no room for more.
HEADLINES = ("scaling", "one element")


@dataclass(frozen=True)
class PowerRow:
    """The smallest flagged defects of one kind, as ``(dtype, text)``, for all checks that have the same texts."""

    check: str
    defect: str
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BlindSpots:
    """The defects that a check would have missed, by kind: in how many tensors, of how many it was planted in."""

    check: str
    kinds: tuple[tuple[str, int, int], ...]

    @property
    def words(self) -> str:
        """E.g. ``truncated 3 of 12, one row zero 1 of 4``."""
        return ", ".join(f"{kind} {missed} of {planted}" for kind, missed, planted in self.kinds)


def flagged_from(power: Power) -> str:
    """The smallest size that was flagged; for a defect without a size, whether it was flagged."""
    if power.size is None:
        return "not flagged"
    return f"{power.size:.1e}" if power.unit else "flagged"


def weakest_power(result: CheckResult) -> str:
    """The largest of the smallest flagged sizes, e.g. ``scaling 3e-05``.

    A scaling of this size is flagged in every tensor in which any scaling was flagged. If no scaling was flagged, the
    other defects with a size count, and if none of them was flagged, a defect without a size. Empty if nothing was
    flagged.
    """
    flagged = [(p, p.size) for p in result.power if p.size is not None]
    sized = [pair for pair in flagged if pair[0].unit]
    scalings = [pair for pair in sized if pair[0].kind == "scaling"]
    found = max(scalings or sized or flagged, key=lambda pair: pair[1], default=None)
    if found is None:
        return ""
    defect, size = found
    return f"{defect.kind} {size:.0e}" if defect.unit else defect.kind


def _passed(results: Sequence[CheckResult], check: str) -> Iterator[tuple[str, Power]]:
    """All defects that were planted for a check, with the dtype of the case."""
    for r in results:
        if r.check == check and r.verdict is Verdict.PASS:
            for p in r.power:
                yield r.parts.dtype, p


def power_rows(results: Sequence[CheckResult], *, kinds: Sequence[str] | None = None) -> tuple[PowerRow, ...]:
    """The smallest flagged sizes by check and dtype: the median over cases and tensors, and the worst if it differs.

    Checks with the same figures share a row.

    Args:
        results: The results of an audit.
        kinds: The kinds of defects to show; None for all kinds with a size.
    """
    dtypes = dtypes_of(results)
    merged: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for check in checks_of(results):
        found: dict[str, dict[str, list[float | None]]] = {}
        for dtype, p in _passed(results, check):
            if p.unit and (kinds is None or p.kind in kinds):
                found.setdefault(p.kind, {}).setdefault(dtype, []).append(p.size)
        for kind, by_dtype in found.items():
            cells = tuple((d, _sizes(by_dtype[d])) for d in dtypes if d in by_dtype)
            merged.setdefault((kind, cells), []).append(check)
    return tuple(PowerRow(", ".join(checks), kind, cells) for (kind, cells), checks in merged.items())


def blind_spots(results: Sequence[CheckResult]) -> tuple[BlindSpots, ...]:
    """For each check the kinds of defects that it missed in some tensor, the most often missed kind first."""
    spots = []
    for check in checks_of(results):
        planted: dict[str, list[bool]] = {}
        for _, p in _passed(results, check):
            planted.setdefault(p.kind, []).append(p.size is None)
        missed = [(kind, sum(found), len(found)) for kind, found in planted.items() if any(found)]
        if missed:
            spots.append(BlindSpots(check, tuple(sorted(missed, key=lambda m: -m[1] / m[2]))))
    return tuple(spots)


def _sizes(sizes: Sequence[float | None]) -> str:
    flagged = [s for s in sizes if s is not None]
    if not flagged:
        return "none flagged"
    median, worst = _size(statistics.median(flagged)), _size(max(flagged))
    text = median if median == worst else f"{median} ({worst})"
    missed = len(sizes) - len(flagged)
    return f"{text}, {missed} not flagged" if missed else text


def _size(size: float) -> str:
    # The search for the smallest defect starts at 1e-17. In a tensor of zeros, every size is flagged.
    return "any" if size < 2e-17 else f"{size:.0e}"
