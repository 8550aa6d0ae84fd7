"""From samples to the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ktonum.bounds import Arithmetic
from ktonum.calibration.blocks import Block
from ktonum.calibration.sampling import Series
from ktonum.calibration.tails import describe_sample, four_digits
from ktonum.cases import dtype_name, torch_dtype
from ktonum.tables import MEASURES, ErrorSample, Row

__all__ = ["RULE", "Pool", "pool_samples", "row_of"]

RULE = (
    "tolerance: what a right result exceeds with the probability false_alarm of its provenance, by the upper "
    "confidence limits of a generalized Pareto tail of the errors, or of their shares of the bound; no less than the "
    "largest error measured, no more than the largest bound that the op's rounding-error analysis derives for the same "
    "inputs, which decides alone where no tail does. errors: in the row's unit; shares: of the bound of an audit's "
    "measurement. See docs/tolerances.md"
)


@dataclass
class Pool:
    """All samples of one output in one measure and dtype.

    Attributes:
        stored: The name of the output's dtype.
        strata: Pairs of point and candidate that they come from.
        errors, bounds, shares, elements: As in `ktonum.calibration.sampling.Series`.
        beyond: Where an error is beyond its bound, in words.
    """

    stored: str
    strata: set[tuple[str, str]] = field(default_factory=set)
    errors: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)

    def add(self, block: Block, series: Series) -> None:
        """Take in what a block has of it."""
        self.strata.add(block.stratum)
        for name in ("errors", "bounds", "shares", "elements"):
            getattr(self, name).extend(getattr(series, name))
        if series.beyond:
            self.beyond.append(f"{block.name}: {series.beyond}")


def pool_samples(found: Iterable[tuple[Block, tuple[Series, ...]]]) -> dict[tuple[str, str, str], Pool]:
    """Samples by (output, measure, dtype)."""
    pools: dict[tuple[str, str, str], Pool] = {}
    for block, listed in found:
        for series in listed:
            key = series.output, series.measure, block.case.dtype
            pools.setdefault(key, Pool(series.stored)).add(block, series)
    return pools


def row_of(key: tuple[str, str, str], pool: Pool, *, device: str, device_class: str, false_alarm: float) -> Row:
    """The row of samples that are all within their bounds.

    Args:
        key: (output, measure, dtype).
        pool: The samples.
        device: ``cpu`` or ``cuda``.
        device_class: See `ktonum.tables.Row`.
        false_alarm: The probability that a right result exceeds the tolerance.
    """
    output, measure, dtype = key
    bound, strata = max(map(four_digits, pool.bounds)), len(pool.strata)
    shares = describe_sample(pool.shares, bound=1.0, strata=strata, false_alarm=false_alarm)
    errors = describe_sample(pool.errors, bound=bound, strata=strata, false_alarm=false_alarm)
    return Row(
        output=output,
        measure=measure,
        dtype=dtype,
        device_class=device_class,
        stored=pool.stored,
        accumulator=dtype_name(Arithmetic.of("precise", torch_dtype(dtype), device).accumulator),
        unit=MEASURES[measure],
        bound=bound,
        samples=len(pool.errors),
        strata=strata,
        elements_min=min(pool.elements),
        elements_max=max(pool.elements),
        errors=_no_looser_than(errors, shares, bound),
        shares=shares,
    )


def _no_looser_than(errors: ErrorSample, shares: ErrorSample, bound: float) -> ErrorSample:
    """A right result keeps to a share of its own bound, which is no larger than ``bound``.

    Errors in roundings differ from point to point as their bounds do, and have heavier tails than their shares.
    """
    granted = max(errors.maximum, four_digits(shares.tolerance * bound))
    if shares.decided_by != "tail" or granted >= errors.tolerance:
        return errors
    return replace(errors, tolerance=granted, decided_by="shares")
