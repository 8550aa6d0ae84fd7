"""What a calibration measures: blocks of fresh seeds at an op's points, by implementations held to be right."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktonum.declare.cases import Case
from ktonum.declare.op import Op

__all__ = ["Block", "Wanted", "blocks_of", "candidates_in_words", "right_candidates"]

# Seeds that one worker measures together, and that are lost when it is killed.
_SEEDS = 20
# Every op's own candidate, by this name.
_OWN = "own"


@dataclass(frozen=True)
class Wanted:
    """What is to be measured of an op.

    Attributes:
        candidates: Names or targets of candidates; none: `right_candidates`.
        profile: ``quick`` or ``full``.
        dtypes: Names of dtypes.
        device: ``cpu`` or ``cuda``.
        first_seed: The offset of the first case.
        seeds: How many inputs are drawn at each point, dtype and candidate.
    """

    candidates: tuple[str, ...]
    profile: str
    dtypes: tuple[str, ...]
    device: str
    first_seed: int
    seeds: int


@dataclass(frozen=True)
class Block:
    """Some seeds of one case with one candidate.

    Attributes:
        op: The op with that candidate.
        candidate: The candidate's short name; ``own`` for the op's own.
        case: The case of the first seed; the others differ in their offset.
        seeds: How many there are.
    """

    op: Op
    candidate: str
    case: Case
    seeds: int

    @property
    def name(self) -> str:
        """Of the samples that are taken: a block of as many seeds by the same candidate has the same."""
        return f"{self.case.name} x{self.seeds} by {self.candidate}"

    @property
    def stratum(self) -> tuple[str, str]:
        """Point and candidate: the samples of one stratum differ in their seed alone."""
        return replace(self.case, offset=0).name, self.candidate

    def cases(self) -> list[Case]:
        """A case for each seed."""
        return [replace(self.case, offset=self.case.offset + i) for i in range(self.seeds)]


def right_candidates(op: Op, dtype: str) -> tuple[str, ...]:
    """Names of the implementations that a calibration takes to be right: the op's own.

    Where the op has a candidate ``upcast``, its reference in float32 that is rounded once, that one takes the place of
    its own in 16 bits, where published functions may store what they should not; and joins it in float32.
    """
    if "upcast" not in op.candidates or dtype == "fp64":  # in float64 it would be the oracle itself
        return (_OWN,)
    return (_OWN, "upcast") if dtype == "fp32" else ("upcast",)


def candidates_in_words(op: Op, wanted: Wanted) -> str:
    """E.g. ``own in fp64; upcast in bf16``; own is the op's own candidate, by its target where it is known by one."""
    by_name: dict[str, list[str]] = {}
    for dtype in wanted.dtypes:
        for name in wanted.candidates or right_candidates(op, dtype):
            by_name.setdefault(name, []).append(dtype)
    targets = {_OWN: op.candidate if isinstance(op.candidate, str) else getattr(op.candidate, "__qualname__", _OWN)}
    return "; ".join(f"{targets.get(name, name)} in {', '.join(found)}" for name, found in by_name.items())


def blocks_of(op: Op, wanted: Wanted) -> list[Block]:
    """The blocks of an op, those of a case together.

    Points that name their checks are left out: growing sizes, edges of tiles and production sizes are there for one
    question each, and would take most of the time.

    Raises:
        UsageError: A candidate is unknown, or the profile is.
    """
    found = []
    for case in op.cases(profile=wanted.profile, dtypes=wanted.dtypes, device=wanted.device):
        if case.point.checks:
            continue
        for name in wanted.candidates or right_candidates(op, case.dtype):
            chosen = op if name == _OWN else op.with_candidate(name)
            for first in range(0, wanted.seeds, _SEEDS):
                start = replace(case, offset=wanted.first_seed + first)
                found.append(Block(chosen, name, start, min(_SEEDS, wanted.seeds - first)))
    return found
