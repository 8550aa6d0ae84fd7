"""What an audit says: verdicts, measurements, power, and the report that holds them.

A leaf: it imports neither torch nor pytest, so that results can be read, merged and compared anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

__all__ = ["STANDARDS", "CheckResult", "Localisation", "Measurement", "Power", "Report", "Verdict"]

SCHEMA = "ktonum-report/1"
#: What a candidate can be held to; the first is the default.
STANDARDS = ("precise", "eager")
# Fields of a measurement that may be written as text, for want of infinities in JSON.
_NUMBERS = ("value", "bound", "standard_error")


class Verdict(StrEnum):
    """The answer to one check on one case."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    ERROR = "ERROR"


@dataclass(frozen=True)
class Measurement:
    """One number and the bound it is held against.

    Attributes:
        name: What was measured, as ``output/measure``, e.g. ``grad_weight/relative_norm``.
        value: The measured error, in ``unit``; NaN never passes.
        bound: The largest value that passes, in the same unit.
        unit: ``"1"`` for a pure number, ``"bound"`` for errors divided by a per-element bound, ``"ulp"`` ...
        bound_source: Where the bound comes from: a derivation, a table row, a law.
        where: The worst place, e.g. ``[3, 17]``; empty when the measure has no place.
        standard_error: Of a value that is a mean, in ``unit``; None for any other.
    """

    name: str
    value: float
    bound: float
    unit: str = "1"
    bound_source: str = ""
    where: str = ""
    standard_error: float | None = None

    @property
    def within(self) -> bool:
        """Whether the value is no larger than the bound; false for NaN."""
        return self.value <= self.bound

    @property
    def use(self) -> float:
        """The share of the bound that was used, value / bound; ``inf`` for NaN and where no error is granted."""
        if math.isnan(self.value):
            return math.inf
        if self.bound == 0.0:
            return 0.0 if self.value == 0.0 else math.inf
        return self.value / self.bound


@dataclass(frozen=True)
class Power:
    """A kind of planted defect, and the smallest of it that the same check on the same case flagged.

    Attributes:
        defect: What was planted and where, as ``TENSOR: KIND, UNIT``, e.g. ``grad_weight: scaling, by 1 + size``. A
            kind without a size has no unit, as ``grad_weight: one row zero``; one that is none of a tensor, no tensor.
        size: How large it had to be, 1 for a kind without a size; ``None`` when none was flagged.
    """

    defect: str
    size: float | None


@dataclass(frozen=True)
class Localisation:
    """Where a failing tensor is wrong, and what its error looks like.

    Attributes:
        tensor: The tensor's name, e.g. ``grad_weight``.
        where: E.g. ``the last tile along dim 0 (V), from 256 on``.
        looks_like: E.g. ``sign flipped``; empty where that cannot be told.
    """

    tensor: str
    where: str
    looks_like: str

    @property
    def lines(self) -> tuple[str, ...]:
        """For a reader: a line that says where, and one of what it looks like unless that cannot be told."""
        look = (f"{self.tensor} looks like: {self.looks_like}",) if self.looks_like else ()
        return (f"{self.tensor} where: {self.where}", *look)


@dataclass(frozen=True)
class CheckResult:
    """The verdict of one check on one case.

    Attributes:
        case: The case's name; the seed derives from it.
        check: The check's name.
        verdict: The decision under ``standard``.
        measurements: All that was measured; the worst is `worst`.
        power: What the check would have caught here.
        reason: Why the verdict is not PASS, in a sentence; may carry a remark for PASS.
        standard: The standard that decided, ``precise`` or ``eager``.
        meets: The standards under which every measurement is within its bound.
        seconds: Wall time spent; information only, no verdict depends on it.
        details: Further text for a reader, e.g. a candidate's traceback.
        localisations: For each failing tensor where it is wrong and what that looks like, worst first.
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
        record: dict[str, Any] = _plain(dataclasses.asdict(self))
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CheckResult:
        """The inverse of `to_record`."""
        fields = dict(record)
        fields["verdict"] = Verdict(fields["verdict"])
        fields["measurements"] = tuple(
            Measurement(**{**m, **{k: float(m[k]) for k in _NUMBERS if m.get(k) is not None}})
            for m in fields.get("measurements", ())
        )
        fields["power"] = tuple(
            Power(p["defect"], None if p["size"] is None else float(p["size"])) for p in fields.get("power", ())
        )
        fields["meets"] = tuple(fields.get("meets", ()))
        fields["localisations"] = tuple(Localisation(**found) for found in fields.get("localisations", ()))
        return cls(**fields)


@dataclass(frozen=True)
class Report:
    """All results of one audit, with the environment they were measured in."""

    results: tuple[CheckResult, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when nothing failed; INCONCLUSIVE results do not fail. An empty report is not ok."""
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """FAIL, ERROR and vacuous results."""
        return tuple(r for r in self.results if r.failed)

    @property
    def inconclusive(self) -> tuple[CheckResult, ...]:
        """Results whose check could not tell."""
        return tuple(r for r in self.results if r.verdict is Verdict.INCONCLUSIVE)

    def counts(self) -> dict[str, int]:
        """How many results have each verdict, and how many are vacuous."""
        counts = {v.value: sum(r.verdict is v for r in self.results) for v in Verdict}
        counts["vacuous"] = sum(r.vacuous for r in self.results)
        return counts

    def to_json(self, path: str | Path) -> None:
        """Write the report; `from_json` reads it back."""
        document = {
            "schema": SCHEMA,
            "environment": _plain(dict(self.environment)),
            "results": [r.to_record() for r in self.results],
        }
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The file is not a report of this schema.
        """
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a ktonum report: expected the key schema = {SCHEMA!r}")
        return cls(tuple(CheckResult.from_record(r) for r in document["results"]), document["environment"])


def _plain(value: Any) -> Any:
    """``value`` with enums as strings and non-finite floats as text, so that strict JSON readers accept it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
