"""One number that a check measured, one planted defect, one place: the parts of a result.

Names are stored in parts. Sentences about results are made in `ktonum.report`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BoundKind", "BoundSource", "Localisation", "Measurement", "Power"]


class BoundKind(StrEnum):
    """What kind of bound a measurement is held to."""

    #: A rounding-error analysis.
    DERIVED = "derived"
    #: A multiple of the reference's own error: a better reference tightens it.
    MEASURED = "measured"
    #: The larger one of a derived and a measured bound.
    LARGER = "larger"
    #: Equality: no error is allowed.
    EXACT = "exact"
    #: A row of a tolerance table.
    TABLE = "table"
    #: The error bar of a finite difference.
    ERROR_BAR = "error_bar"
    #: A number that the op's author declared.
    DECLARED = "declared"
    #: No bound: the value is shown and decides nothing.
    NONE = "none"


@dataclass(frozen=True)
class BoundSource:
    """Where a bound comes from.

    Attributes:
        kind: What kind of bound it is.
        standard: Of a derived bound, the standard: ``precise`` or ``eager``. Empty for any other.
        scale: What an error was multiplied by to make the bound; None where the bound is no multiple of an error.
        dtype: Of a measured bound, the dtype in which the reference ran, e.g. ``bf16``.
        autocast: Whether the reference ran under autocast to that dtype.
        text: In the words of the check or the table: which equation must hold, which row it is. Nothing depends on it.
    """

    kind: BoundKind
    standard: str = ""
    scale: float | None = None
    dtype: str = ""
    autocast: bool = False
    text: str = ""

    @property
    def follows_reference(self) -> bool:
        """Whether a reference with a smaller error would have made the bound smaller."""
        return self.kind in (BoundKind.MEASURED, BoundKind.LARGER)


_NO_BOUND = BoundSource(BoundKind.NONE)


def _subject(tensor: str, context: str) -> str:
    return f"{tensor} {context}" if context else tensor


@dataclass(frozen=True)
class Measurement:
    """One number and the bound it is held against.

    Attributes:
        tensor: The tensor's name, gradients as ``grad_INPUT``; empty for a number that is no tensor's.
        measure: What was measured of it, e.g. ``relative_norm``.
        value: The measured error, in ``unit``; NaN never passes.
        bound: The largest value that passes, in the same unit.
        unit: ``"1"`` for a pure number, ``"bound"`` for errors divided by a per-element bound, ``"ulp"`` ...
        bound_source: Where the bound comes from.
        where: The index of the worst element; None when the measure has no place.
        standard_error: Of a value that is a mean, in ``unit``; None for any other.
        context: Under which circumstances the tensor was made, e.g. ``at expanded ones``; empty for the usual ones.
        draws: Over how many draws of the inputs it was measured; None for the case's own inputs alone.
        remark: What the check says about the number, e.g. which way of adding fits it. Nothing depends on it.
    """

    tensor: str
    measure: str
    value: float
    bound: float
    unit: str = "1"
    bound_source: BoundSource = _NO_BOUND
    where: tuple[int, ...] | None = None
    standard_error: float | None = None
    context: str = ""
    draws: int | None = None
    remark: str = ""

    @property
    def subject(self) -> str:
        """Tensor and context, e.g. ``grad_weight at expanded ones``."""
        return _subject(self.tensor, self.context)

    @property
    def name(self) -> str:
        """For display and for matching, e.g. ``grad_weight at expanded ones/relative_norm``."""
        over = "" if self.draws is None else f" over {self.draws} draws"
        return "/".join(filter(None, (self.subject, f"{self.measure}{over}")))

    @property
    def within(self) -> bool:
        """Whether the value is no larger than the bound; false for NaN."""
        return self.value <= self.bound

    @property
    def use(self) -> float:
        """The share of the bound that was used, value / bound; ``inf`` for NaN and where no error is allowed."""
        if math.isnan(self.value):
            return math.inf
        if self.bound == 0.0:
            return 0.0 if self.value == 0.0 else math.inf
        return self.value / self.bound


@dataclass(frozen=True)
class Power:
    """A kind of planted defect, and the smallest of it that the same check on the same case flagged.

    Attributes:
        tensor: Where it was planted; empty for a defect that is no tensor's.
        kind: What was planted, e.g. ``scaling`` or ``one row zero``.
        unit: What its size means, e.g. ``by 1 + size``; empty for a kind without a size.
        size: How large it had to be, 1 for a kind without a size; None when none was flagged.
        context: Of the tensor, as in `Measurement`.
    """

    tensor: str
    kind: str
    unit: str
    size: float | None
    context: str = ""

    @property
    def defect(self) -> str:
        """For display, e.g. ``grad_weight: scaling, by 1 + size``."""
        words = ", ".join(filter(None, (self.kind, self.unit)))
        return ": ".join(filter(None, (_subject(self.tensor, self.context), words)))


@dataclass(frozen=True)
class Localisation:
    """Where a failing tensor is wrong, and what its error looks like.

    Attributes:
        tensor: The tensor's name, e.g. ``grad_weight``.
        where: E.g. ``the last tile along dim 0 (V), from 256 on``.
        looks_like: E.g. ``sign flipped``; empty where that cannot be told.
        context: Of the tensor, as in `Measurement`.
    """

    tensor: str
    where: str
    looks_like: str
    context: str = ""

    @property
    def subject(self) -> str:
        """Tensor and context, e.g. ``grad_weight at expanded ones``."""
        return _subject(self.tensor, self.context)
