"""One check on one case: its verdict, why, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ktonum.results.measurement import Localisation, Measurement, Power
from ktonum.results.records import from_record, to_record

__all__ = ["CaseParts", "Cause", "CheckResult", "Verdict"]


class Verdict(StrEnum):
    """The answer to one check on one case."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    ERROR = "ERROR"


class Cause(StrEnum):
    """Why a verdict is not PASS."""

    #: FAIL: a measurement is beyond its bound.
    BEYOND_BOUND = "beyond_bound"
    #: INCONCLUSIVE: the check cannot tell anything about this case.
    CANNOT_TELL = "cannot_tell"
    #: INCONCLUSIVE: the candidate lacks what the case needs.
    CANNOT_RUN = "cannot_run"
    #: INCONCLUSIVE: the candidate has none of the tensors that the check measures.
    NOTHING_MEASURED = "nothing_measured"
    #: INCONCLUSIVE: device memory ran out.
    OUT_OF_MEMORY = "out_of_memory"
    #: ERROR: the candidate raised, or returned something of the wrong structure.
    CANDIDATE_WRONG = "candidate_wrong"
    #: ERROR: the candidate refused inputs that the reference accepts.
    CANDIDATE_REFUSED = "candidate_refused"
    #: ERROR: something else raised: the reference, the op's sample, or the check.
    CHECK_RAISED = "check_raised"
    #: ERROR: the candidate took longer than the time limit.
    HUNG = "hung"
    #: ERROR: the process died while the candidate ran.
    DIED = "died"
    #: ERROR: the candidate left the process without a usable CUDA context.
    CUDA_LOST = "cuda_lost"
    #: ERROR: the check was planned and never run.
    NOT_RUN = "not_run"


@dataclass(frozen=True)
class CaseParts:
    """What a case's name is made of; all empty for a case whose parts are not known.

    Attributes:
        op: The op's name.
        dims: Sizes by name.
        parameters: The op's keyword arguments that are no tensors.
        distribution: How the inputs were drawn.
        dtype: The dtype's name, e.g. ``bf16``.
        device: ``cpu`` or ``cuda``.
        offset: Numbers cases that differ in their seed alone.
    """

    op: str = ""
    dims: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    distribution: str = "normal"
    dtype: str = ""
    device: str = ""
    offset: int = 0

    @property
    def sizes(self) -> str:
        """Dims and parameters, e.g. ``B=4,T=33,beta=0.3``."""
        return ",".join(f"{k}={v}" for k, v in (*self.dims.items(), *self.parameters.items()))

    @property
    def name(self) -> str:
        """E.g. ``kto[B=4,T=33,H=40,V=97,beta=0.3]-bf16-cpu``; the distribution appears when it is not ``normal``.

        An offset comes last, as ``+1``.
        """
        tail = "" if self.distribution == "normal" else f"-{self.distribution}"
        tail += f"+{self.offset}" if self.offset else ""
        return f"{self.op}[{self.sizes}]-{self.dtype}-{self.device}{tail}"


@dataclass(frozen=True)
class CheckResult:
    """The verdict of one check on one case.

    Attributes:
        case: The case's name; the seed derives from it.
        check: The check's name.
        verdict: The decision under ``standard``.
        measurements: All that was measured; the worst is `worst`.
        power: What the check would have caught here.
        reason: Why the verdict is not PASS, in the check's or the candidate's own words. Empty where the other fields
            say it. `ktonum.report.sentences.reason_words` makes the whole sentence.
        standard: The standard that decided, ``precise`` or ``eager``.
        meets: The standards under which every measurement is within its bound.
        seconds: Wall time spent; information only, no verdict depends on it.
        details: Further text for a reader, e.g. a candidate's traceback.
        localisations: For each failing tensor where it is wrong and what that looks like, worst first.
        cause: Why the verdict is not PASS; None for PASS.
        parts: What the case's name is made of.
        question: The statement that a PASS confirms, e.g. ``two runs on the same inputs agree bit for bit``.
    """

    case: str
    check: str
    verdict: Verdict
    measurements: tuple[Measurement, ...] = ()
    power: tuple[Power, ...] = ()
    reason: str = ""
    standard: str = "precise"
    meets: tuple[str, ...] = ()
    seconds: float = 0.0
    details: str = ""
    localisations: tuple[Localisation, ...] = ()
    cause: Cause | None = None
    parts: CaseParts = field(default_factory=CaseParts)
    question: str = ""

    @property
    def vacuous(self) -> bool:
        """Whether the check passed although no planted defect could fail it."""
        return self.verdict is Verdict.PASS and not any(p.size is not None for p in self.power)

    @property
    def failed(self) -> bool:
        """Whether this result fails an audit: FAIL, ERROR, or a vacuous PASS."""
        return self.verdict in (Verdict.FAIL, Verdict.ERROR) or self.vacuous

    @property
    def worst(self) -> Measurement | None:
        """The measurement that used the largest share of its bound."""
        return max(self.measurements, key=lambda m: m.use, default=None)

    def to_record(self) -> dict[str, Any]:
        """A JSON-ready dictionary; non-finite numbers become the strings ``nan``, ``inf``, ``-inf``."""
        return to_record(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CheckResult:
        """The inverse of `to_record`.

        Raises:
            InputError: A field is missing, unknown, or not of its type.
        """
        return from_record(cls, record, "result")
