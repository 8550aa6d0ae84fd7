"""Makes the rows of a table from samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ktonum.bounds import PRECISE
from ktonum.calibrate.block_errors import Series
from ktonum.calibrate.seed_blocks import Block
from ktonum.calibrate.tails import describe_sample, four_digits
from ktonum.declare.cases import dtype_name, torch_dtype
from ktonum.tolerances.tables import MEASURES, Row

__all__ = ["RULE", "Pool", "Stratum", "pool_samples", "row_of"]

RULE = (
    "tolerance: what a right result exceeds with the probability false_alarm of its provenance, by the upper "
    "confidence limits of a generalized Pareto tail of the errors, or of the errors as multiples of their point's "
    "mean; no less than the largest error measured, no more than the largest bound that the op's rounding-error "
    "analysis derives for the same inputs, which decides alone where no tail does. errors: in the row's unit; shares: "
    "of the bound of an audit's measurement. See docs/tolerances.md"
)


@dataclass
class Stratum:
    """The samples of one point and candidate; see `ktonum.calibrate.block_errors.Series`."""

    errors: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)


@dataclass
class Pool:
    """All samples of one output in one measure and dtype.

    Attributes:
        stored: The name of the output's dtype.
        strata: The samples by point and candidate.
        beyond: Errors beyond their bounds, in words.
    """

    stored: str
    strata: dict[tuple[str, str], Stratum] = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(len(stratum.errors) for stratum in self.strata.values())

    def add(self, block: Block, series: Series) -> None:
        """Add the samples of a block."""
        stratum = self.strata.setdefault(block.stratum, Stratum())
        for name in ("errors", "bounds", "shares", "elements"):
            getattr(stratum, name).extend(getattr(series, name))
        if series.beyond:
            self.beyond.append(f"{block.name}: {series.beyond}")


def pool_samples(found: Iterable[tuple[Block, tuple[Series, ...]]]) -> dict[tuple[str, str, str], Pool]:
    """All samples by (output, measure, dtype)."""
    pools: dict[tuple[str, str, str], Pool] = {}
    for block, listed in found:
        for series in listed:
            key = series.output, series.measure, block.case.dtype
            pools.setdefault(key, Pool(series.stored)).add(block, series)
    return pools


def row_of(key: tuple[str, str, str], pool: Pool, *, device: str, device_class: str, false_alarm: float) -> Row:
    """The row for samples that are all within their bounds.

    Args:
        key: (output, measure, dtype).
        pool: The samples.
        device: ``cpu`` or ``cuda``.
        device_class: See `ktonum.tolerances.tables.Row`.
        false_alarm: The probability that a right result exceeds the tolerance.
    """
    output, measure, dtype = key
    errors, shares = ([getattr(s, name) for s in pool.strata.values()] for name in ("errors", "shares"))
    bounds = [four_digits(value) for stratum in pool.strata.values() for value in stratum.bounds]
    elements = [size for stratum in pool.strata.values() for size in stratum.elements]
    rounding = _one_rounding(measure, max(elements))
    bound = max(rounding, *bounds)
    return Row(
        output=output,
        measure=measure,
        dtype=dtype,
        device_class=device_class,
        stored=pool.stored,
        accumulator=dtype_name(PRECISE.arithmetic(torch_dtype(dtype), device).accumulator),
        unit=MEASURES[measure],
        bound=bound,
        samples=pool.samples,
        strata=len(pool.strata),
        elements_min=min(elements),
        elements_max=max(elements),
        errors=describe_sample(errors, bound=bound, false_alarm=false_alarm, least=rounding),
        shares=describe_sample(shares, bound=1.0, false_alarm=false_alarm),
    )


def _one_rounding(measure: str, elements: int) -> float:
    """The largest error in ``half_ulp`` of rounding the exact result once, for any inputs.

    The unit is the sum of half an ulp at the element and half an ulp at its row's typical size. A single element has
    the typical size. One of several elements may be far above it.
    """
    if measure != "element":
        return 0.0
    return 0.5 if elements == 1 else 1.0
