"""Tolerance tables: rows of measured tolerances, their provenance, and how one is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MEASURES", "LookUp", "Provenance", "Row", "Table"]

#: Measures and the unit that each is in; `ktonum.rounding_errors` defines them.
MEASURES = {"element": "half_ulp", "relative_norm": "rounding_norm", "signed_bias": "rounding_norm"}


@dataclass(frozen=True)
class Provenance:
    """What all rows of one device class were measured with.

    Attributes:
        device: The device's name.
        ktonum, python, torch, triton: Versions.
        cuda, driver: Versions, empty without a GPU or where they cannot be told.
        commit: Of the checkout, with ``+`` for uncommitted changes.
        date: Year-month-day.
        command: What was run.
        profile: Whose points were measured, ``quick`` or ``full``.
        seeds: How many inputs were drawn at each point and dtype.
        dims: The largest size measured, by name.
    """

    device: str
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
    seeds: int
    dims: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One tolerance and the sample it rests on. All errors are in ``unit``.

    Attributes:
        output: An output's name, or ``grad_INPUT``.
        measure: One of `MEASURES`.
        dtype: The dtype under audit, one of `ktonum.cases.DTYPES`.
        device_class: ``sm_90`` and the like, ``cpu``, or ``interpreter`` for Triton's on a CPU.
        stored: The dtype of this output, in whose roundings errors are counted: a bf16 loss is float32.
        unit: The measure's, see `MEASURES`.
        tolerance: The largest error that passes; ``maximum`` ≤ ``tolerance`` ≤ ``bound``.
        bound: The largest bound derived from the op's rounding-error analysis over the same samples.
        maximum, quantile_99, median: Of the measured errors.
        samples: How many tensors were measured.
        elements_min, elements_max: Sizes of the smallest and the largest of them.
    """

    output: str
    measure: str
    dtype: str
    device_class: str
    stored: str
    unit: str
    tolerance: float
    bound: float
    maximum: float
    quantile_99: float
    median: float
    samples: int
    elements_min: int
    elements_max: int

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
        self, *, output: str, measure: str, dtype: str, device_class: str, dims: Mapping[str, int] | None = None
    ) -> LookUp:
        """The row with exactly this key, and an explanation either way; nothing is inferred from similar rows.

        Args:
            output: Name of the output, or ``grad_INPUT``.
            measure: One of `MEASURES`.
            dtype: Name of the dtype under audit.
            device_class: See `Row`.
            dims: Sizes of the case by name; a row that was not measured at such sizes does not apply. None: not asked.
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
        sample = f"largest of {row.samples} measured {row.maximum:g} at sizes up to {largest}, bound {row.bound:g}"
        made_with = f"{made.date}, {made.device}, torch {made.torch}, triton {made.triton}, commit {made.commit}"
        return LookUp(row, f"row {row.name} of {self.source}: {sample} ({made_with})")

    def _nearest(self, key: tuple[str, ...]) -> str:
        kept, found = self.rows, ""
        for attribute, wanted in zip(("output", "measure", "dtype", "device_class"), key, strict=True):
            there = ", ".join(sorted({getattr(r, attribute) for r in kept}))
            kept = tuple(r for r in kept if getattr(r, attribute) == wanted)
            if not kept:
                return f"row for {attribute.replace('_', ' ')} {wanted!r}{found}: it has {there or 'no rows'}"
            found = f"{found or ' with'} {wanted}"
        return "such row"
