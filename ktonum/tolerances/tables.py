"""Tolerance tables: rows of measured tolerances, their provenance, and their look-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MEASURES", "ErrorSample", "LookUp", "Provenance", "Row", "Table", "Tail"]

#: The unit of each measure; `ktonum.measure.in_roundings` defines both.
MEASURES = {"element": "half_ulp", "relative_norm": "rounding_norm", "signed_bias": "rounding_norm"}


@dataclass(frozen=True)
class Provenance:
    """How all rows of one device class were measured.

    Attributes:
        device: The device's name.
        multiprocessors: The number of a GPU's multiprocessors; 0 for a CPU.
        ktonum, python, torch, triton: Versions; empty if unknown.
        cuda, driver: Versions; empty without a GPU, or if unknown.
        commit: The commit of the checkout, with ``+`` for uncommitted changes.
        date: Year-month-day.
        command: The command that measured the rows.
        profile: The profile whose points were measured, ``quick`` or ``full``.
        candidates: The implementations that were measured and are assumed to be right, by dtype, in words.
        seeds: The number of inputs that were drawn for each point, dtype and candidate.
        false_alarm: The probability, according to the fitted tails, that a tolerance flags a right result.
        dims: The largest size that was measured, by name.
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
        exceeding: The number of errors above the threshold. If 0, no tail was fitted, and the other numbers are 0.
        threshold: u, in the unit of the errors.
        shape: ξ. It is below zero if the errors have an upper limit.
        scale: σ, in the unit of the errors.
        fit: The p-value of the Anderson–Darling test. It is small if the errors do not follow the distribution.
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
        median, quantile_90, quantile_99, maximum: Order statistics of the measured errors.
        tolerance: The largest error that passes; ``maximum`` ≤ ``tolerance`` ≤ the bound.
        decided_by: What determines the tolerance: ``tail``, the tail of the errors; ``strata``, the tail of errors as
            multiples of their stratum's mean; ``rounding``, the largest error of rounding the exact result once, if
            the tail gives less; or ``bound: REASON``.
        typical: The factor of the tail's tolerance: 1, or for ``strata`` the upper limit of the largest stratum's mean.
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
    """One tolerance and the sample that it is based on.

    Attributes:
        output: An output's name, or ``grad_INPUT``.
        measure: One of `MEASURES`.
        dtype: The dtype under audit, one of `ktonum.declare.cases.DTYPES`.
        device_class: ``sm_90`` and the like, ``cpu``, or ``interpreter`` for Triton's interpreter on a CPU.
        stored: The dtype of this output. Errors are counted in its roundings. The loss of a bf16 op, for example, is
            float32.
        accumulator: The dtype that sums are accumulated in.
        unit: The unit of the measure, see `MEASURES`.
        bound: The largest bound that the op's rounding-error analysis gives for the same inputs, in ``unit``; at least
            one rounding of the output.
        samples: The number of tensors that were measured.
        strata: The number of pairs of point and candidate that they come from; see `ktonum.calibrate.tails`.
        elements_min, elements_max: The number of elements of the smallest and of the largest of these tensors.
        errors: The errors in ``unit``.
        shares: The errors as shares of the bound of an audit's measurement; 1 is the whole bound.
        tolerance_before, reason, reason_date: If the tolerance was loosened: the one before, why, and when. Otherwise 0
            and empty.
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
        """(output, measure, dtype, device class), which identifies a row within its table."""
        return self.output, self.measure, self.dtype, self.device_class

    @property
    def name(self) -> str:
        """The key in words, e.g. ``grad_weight/element/bf16/sm_90``."""
        return "/".join(self.key)


@dataclass(frozen=True)
class LookUp:
    """The result of a look-up: ``row``, or None; and ``why``, which names the row or says why there is none."""

    row: Row | None
    why: str


@dataclass(frozen=True)
class Table:
    """The tolerances of one op.

    Attributes:
        op: The op's name.
        rule: How tolerances follow from measured errors, in words.
        rows: The rows. No two have the same key.
        provenance: How the rows were measured, by device class.
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
        """The row with exactly this key, and an explanation of the result. A similar row is never used instead.

        Args:
            output: Name of the output, or ``grad_INPUT``.
            measure: One of `MEASURES`.
            dtype: Name of the dtype under audit.
            device_class: See `Row`.
            dims: Sizes of the case by name. A row is not used if one of them is larger than measured. None: any sizes.
            device: The device's name. The explanation says if the row was measured on another one. Empty: any device.
        """
        key = (output, measure, dtype, device_class)
        row = next((r for r in self.rows if r.key == key), None)
        if row is None:
            return LookUp(None, f"{self.source} has no {self._nearest(key)}")
        made = self.provenance[device_class]
        largest = ", ".join(f"{k}={v}" for k, v in made.dims.items())
        for name, size in (dims or {}).items():
            if size > made.dims.get(name, -1):
                why = f"was measured at sizes up to {largest}, and {name}={size} is larger"
                return LookUp(None, f"{row.name} in {self.source} {why}")
        errors = row.errors
        words = {"tail": "the fitted tail", "strata": "the fitted tail of multiples of each point's mean"}
        words["rounding"] = "the largest error of one rounding"
        decided = words.get(errors.decided_by, f"the {errors.decided_by}")
        sample = (
            f"tolerance {errors.tolerance:g} by {decided}; largest of {row.samples} measured errors {errors.maximum:g} "
            f"at sizes up to {largest}; bound {row.bound:g}"
        )
        made_with = f"{made.date}, {made.device}, torch {made.torch}, triton {made.triton}, commit {made.commit}"
        why = f"row {row.name} of {self.source}: {sample} ({made_with})"
        if row.reason:
            why += f"; loosened from {row.tolerance_before:g} on {row.reason_date}: {row.reason}"
        if carried := self.carried_over(device_class, device):
            why += f"; {carried}"
        return LookUp(row, why)

    def carried_over(self, device_class: str, device: str) -> str:
        """Words for rows of this class that were measured on another device than ``device``; otherwise empty."""
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
