"""Tolerance tables: rows of measured tolerances, their provenance, and how one is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MEASURES", "ErrorSample", "LookUp", "Provenance", "Row", "Table", "Tail"]

#: Measures and the unit that each is in; `ktonum.measure.in_roundings` defines them.
MEASURES = {"element": "half_ulp", "relative_norm": "rounding_norm", "signed_bias": "rounding_norm"}


@dataclass(frozen=True)
class Provenance:
    """What all rows of one device class were measured with.

    Attributes:
        device: The device's name.
        multiprocessors: Of a GPU; 0 for a CPU.
        ktonum, python, torch, triton: Versions.
        cuda, driver: Versions, empty without a GPU or where they cannot be told.
        commit: Of the checkout, with ``+`` for uncommitted changes.
        date: Year-month-day.
        command: What was run.
        profile: Whose points were measured, ``quick`` or ``full``.
        candidates: What was measured, in words: the implementations held to be right, by dtype.
        seeds: How many inputs were drawn at each point, dtype and candidate.
        false_alarm: The budget: the probability, by the fitted tails, that a tolerance flags a right result.
        dims: The largest size measured, by name.
    """

    device: str
    multiprocessors: int
    ktonum: str
    python: str
    torch: str
    triton: str
    cuda: str
    driver: str
    commit: str
    date: str
    command: str
    profile: str
    candidates: str
    seeds: int
    false_alarm: float
    dims: Mapping[str, int]


@dataclass(frozen=True)
class Tail:
    """A generalized Pareto distribution fitted to the errors above a threshold, see `ktonum.calibrate.tails`.

    Attributes:
        exceeding: How many errors are above the threshold; 0: none was fitted, and the other numbers are 0.
        threshold: In the errors' unit.
        shape: ξ; below zero where the errors have an end.
        scale: σ, in the errors' unit.
        fit: The p-value of the Anderson–Darling test: small where the errors do not follow the distribution.
    """

    exceeding: int
    threshold: float
    shape: float
    scale: float
    fit: float


@dataclass(frozen=True)
class ErrorSample:
    """Errors of one output in one measure, their tail, and the tolerance that follows.

    Attributes:
        median, quantile_90, quantile_99, maximum: Order statistics of what was measured.
        tolerance: The largest error that passes; ``maximum`` ≤ ``tolerance`` ≤ the bound.
        decided_by: ``tail``; ``strata`` for that of errors as multiples of their stratum's mean; ``rounding`` where
            either gives less than rounding the exact result once may come to; or ``bound`` and why.
        typical: What the tail's tolerance is multiplied by: 1, or the largest mean of a stratum.
        tail: The fitted tail.
    """

    median: float
    quantile_90: float
    quantile_99: float
    maximum: float
    tolerance: float
    decided_by: str
    typical: float
    tail: Tail


@dataclass(frozen=True)
class Row:
    """One tolerance and the sample it rests on.

    Attributes:
        output: An output's name, or ``grad_INPUT``.
        measure: One of `MEASURES`.
        dtype: The dtype under audit, one of `ktonum.declare.cases.DTYPES`.
        device_class: ``sm_90`` and the like, ``cpu``, or ``interpreter`` for Triton's on a CPU.
        stored: The dtype of this output, in whose roundings errors are counted: a bf16 loss is float32.
        accumulator: The dtype that sums are accumulated in.
        unit: The measure's, see `MEASURES`.
        bound: The largest bound derived from the op's rounding-error analysis over the same samples, in ``unit``; no
            less than one rounding of the output.
        samples: How many tensors were measured.
        strata: How many pairs of point and candidate they come from; see `ktonum.calibrate.tails`.
        elements_min, elements_max: Sizes of the smallest and the largest of them.
        errors: The errors in ``unit``.
        shares: The errors as shares of the bound of an audit's measurement; 1 is the whole bound.
        tolerance_before, reason, reason_date: What a looser tolerance took the place of, why, and when; empty for one
            that was never loosened.
    """

    output: str
    measure: str
    dtype: str
    device_class: str
    stored: str
    accumulator: str
    unit: str
    bound: float
    samples: int
    strata: int
    elements_min: int
    elements_max: int
    errors: ErrorSample
    shares: ErrorSample
    tolerance_before: float = 0.0
    reason: str = ""
    reason_date: str = ""

    @property
    def tolerance(self) -> float:
        """The largest error that passes, in ``unit``."""
        return self.errors.tolerance

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(output, measure, dtype, device class): what identifies a row within its table."""
        return self.output, self.measure, self.dtype, self.device_class

    @property
    def name(self) -> str:
        """The key in words, e.g. ``grad_weight/element/bf16/sm_90``."""
        return "/".join(self.key)


@dataclass(frozen=True)
class LookUp:
    """What a look-up found: ``row``, or None; and which row it is, or why there is none, in words."""

    row: Row | None
    why: str


@dataclass(frozen=True)
class Table:
    """The tolerances of one op.

    Attributes:
        op: The op's name.
        rule: How tolerances follow from what was measured, in words.
        rows: The rows, no two with the same key.
        provenance: By device class.
        source: The file, for messages.
    """

    op: str
    rule: str
    rows: tuple[Row, ...]
    provenance: Mapping[str, Provenance]
    source: str = field(default="", compare=False)

    def look_up(
        self,
        *,
        output: str,
        measure: str,
        dtype: str,
        device_class: str,
        dims: Mapping[str, int] | None = None,
        device: str = "",
    ) -> LookUp:
        """The row with exactly this key, and an explanation either way; nothing is inferred from similar rows.

        Args:
            output: Name of the output, or ``grad_INPUT``.
            measure: One of `MEASURES`.
            dtype: Name of the dtype under audit.
            device_class: See `Row`.
            dims: Sizes of the case by name; a row that was not measured at such sizes does not apply. None: not asked.
            device: The device's name, which the explanation compares with the one measured; empty: not asked.
        """
        key = (output, measure, dtype, device_class)
        row = next((r for r in self.rows if r.key == key), None)
        if row is None:
            return LookUp(None, f"{self.source} has no {self._nearest(key)}")
        made = self.provenance[device_class]
        largest = ", ".join(f"{k}={v}" for k, v in made.dims.items())
        for name, size in (dims or {}).items():
            if size > made.dims.get(name, -1):
                why = f"was measured at sizes up to {largest}, which {name}={size} is beyond"
                return LookUp(None, f"{row.name} in {self.source} {why}")
        errors = row.errors
        words = {"tail": "the fitted tail", "strata": "the fitted tail of multiples of each point's mean"}
        words["rounding"] = "what one rounding may come to"
        decided = words.get(errors.decided_by, f"the {errors.decided_by}")
        sample = (
            f"tolerance {errors.tolerance:g} by {decided}; largest of {row.samples} measured {errors.maximum:g} at "
            f"sizes up to {largest}, bound {row.bound:g}"
        )
        made_with = f"{made.date}, {made.device}, torch {made.torch}, triton {made.triton}, commit {made.commit}"
        why = f"row {row.name} of {self.source}: {sample} ({made_with})"
        if row.reason:
            why += f"; loosened from {row.tolerance_before:g} on {row.reason_date}: {row.reason}"
        if carried := self.carried_over(device_class, device):
            why += f"; {carried}"
        return LookUp(row, why)

    def carried_over(self, device_class: str, device: str) -> str:
        """That rows of this class were measured on another device than the one named; empty where they were not."""
        made = self.provenance[device_class].device
        if not device or device == made:
            return ""
        return f"carried over: measured on {made}, another device of the class {device_class} than this {device}"

    def _nearest(self, key: tuple[str, ...]) -> str:
        kept, found = self.rows, ""
        for attribute, wanted in zip(("output", "measure", "dtype", "device_class"), key, strict=True):
            there = ", ".join(sorted({getattr(r, attribute) for r in kept}))
            kept = tuple(r for r in kept if getattr(r, attribute) == wanted)
            if not kept:
                return f"row for {attribute.replace('_', ' ')} {wanted!r}{found}: it has {there or 'no rows'}"
            found = f"{found or ' with'} {wanted}"
        return "such row"
