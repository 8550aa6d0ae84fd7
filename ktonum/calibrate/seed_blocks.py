"""The work of a calibration: blocks of new seeds at an op's points, with implementations that are taken to be right."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktonum.declare.cases import Case
from ktonum.declare.op import Op

__all__ = ["Block", "Wanted", "blocks_of", "candidates_in_words", "right_candidates"]

# Number of seeds that one worker measures together. If the worker is killed, they are lost.
_SEEDS = 20
# The name of every op's own candidate.
_OWN = "own"


@dataclass(frozen=True)
class Wanted:
    """The measurements that a calibration takes of an op.

    Attributes:
        candidates: Names or targets of candidates; if empty, `right_candidates`.
        profile: ``quick`` or ``full``.
        dtypes: Names of dtypes.
        device: ``cpu`` or ``cuda``.
        first_seed: The offset of the first case.
        seeds: The number of draws of the inputs for each point, dtype and candidate.
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
        case: The case of the first seed; those of the other seeds differ in the offset.
        seeds: The number of seeds.
    """

    op: Op
    candidate: str
    case: Case
    seeds: int

    @property
    def name(self) -> str:
        """The name of the block's samples: case of the first seed, number of seeds, and candidate."""
        return f"{self.case.name} x{self.seeds} by {self.candidate}"

    @property
    def stratum(self) -> tuple[str, str]:
        """Case without its offset, and candidate: the samples of one stratum differ only in their seed."""
        return replace(self.case, offset=0).name, self.candidate

    def cases(self) -> list[Case]:
        """A case for each seed."""
        return [replace(self.case, offset=self.case.offset + i) for i in range(self.seeds)]


def right_candidates(op: Op, dtype: str) -> tuple[str, ...]:
    """Names of the implementations that a calibration takes to be right: usually the op's own candidate.

    An op may have a candidate ``upcast``: its reference in float32, rounded once. In 16-bit dtypes ``upcast`` replaces
    the op's own candidate, because published functions may round intermediate values there. In float32 both are used.
    """
    if "upcast" not in op.candidates or dtype == "fp64":  # in float64 it would be the oracle itself
        return (_OWN,)
    return (_OWN, "upcast") if dtype == "fp32" else ("upcast",)


def candidates_in_words(op: Op, wanted: Wanted) -> str:
    """E.g. ``own in fp64; upcast in bf16``. If known, the target or name of the op's candidate replaces ``own``."""
    by_name: dict[str, list[str]] = {}
    for dtype in wanted.dtypes:
        for name in wanted.candidates or right_candidates(op, dtype):
            by_name.setdefault(name, []).append(dtype)
    targets = {_OWN: op.candidate if isinstance(op.candidate, str) else getattr(op.candidate, "__qualname__", _OWN)}
    return "; ".join(f"{targets.get(name, name)} in {', '.join(found)}" for name, found in by_name.items())


def blocks_of(op: Op, wanted: Wanted) -> list[Block]:
    """The blocks of an op. The blocks of a case follow each other.

    Points that name their checks are left out. Such points have growing sizes, edges of tiles or production sizes for
    single checks, and would take most of the time.

    Raises:
        UsageError: A candidate or the profile is unknown.
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
