"""Errors of one block of seeds: in roundings of the output, and as shares of an audit's bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ktonum.bounds import PRECISE, ErrorBound
from ktonum.calibrate.seed_blocks import Block
from ktonum.case.context import CaseContext
from ktonum.declare.cases import dtype_name
from ktonum.measure.in_roundings import derived_tolerances, measure_errors
from ktonum.measure.probe import bounded_probe

__all__ = ["Series", "sample_block"]

# Errors of tensors with up to this many elements are measured on the CPU. Hundreds of waits for a GPU take longer.
_SMALL = 2**20


@dataclass(frozen=True)
class Series:
    """The errors of one tensor in one measure; each tuple has an entry for each seed of a block.

    Attributes:
        output: The tensor's name; a gradient's is ``grad_INPUT``.
        measure: One of `ktonum.tolerances.tables.MEASURES`.
        stored: The name of the tensor's dtype.
        errors: The errors, in the unit of the measure.
        bounds: The derived bounds on these errors, in the same unit.
        shares: The same errors as an audit measures them, as shares of its bounds.
        elements: The tensor's number of elements.
    """

    output: str
    measure: str
    stored: str
    errors: tuple[float, ...]
    bounds: tuple[float, ...]
    shares: tuple[float, ...]
    elements: tuple[int, ...]

    @property
    def beyond(self) -> str:
        """The first error beyond its bound, in words; empty if there is none."""
        for error, bound, share in zip(self.errors, self.bounds, self.shares, strict=True):
            if not (error <= bound and share <= 1):
                return f"{self.output}/{self.measure} = {error:.4g}, bound {bound:.4g}; {share:.4g} of an audit's bound"
        return ""


def sample_block(block: Block) -> tuple[Series, ...]:
    """Run the candidate for every seed of the block and measure the errors of its outputs and gradients.

    Tensors that the op declares `cancelling` are left out, and those whose finite elements are all exactly zero,
    because their errors cannot be counted in their own roundings.

    Raises:
        KtonumError: The candidate raised an exception, refused the case, or returned another structure than the
            reference.
    """
    found: dict[tuple[str, str], Series] = {}
    for case in block.cases():
        context = CaseContext(block.op, case)
        actual, bounds = context.result.tensors(), context.bounds(PRECISE.name)
        for output, expected in context.expected().items():
            if output in block.op.cancelling or not bool((expected.isfinite() & (expected != 0)).any()):
                continue
            for series in _measured(output, actual[output], expected, bounds[output]):
                key = series.output, series.measure
                found[key] = series if key not in found else _joined(found[key], series)
    return tuple(found.values())


def _measured(output: str, actual: Tensor, expected: Tensor, bound: ErrorBound) -> list[Series]:
    if expected.numel() <= _SMALL:
        actual, expected = actual.cpu(), expected.cpu()
        bound = replace(bound, independent=bound.independent.cpu(), coherent=bound.coherent.cpu())
    errors = measure_errors(actual=actual, expected=expected, stored=bound.dtype).values
    granted = derived_tolerances(
        expected=expected, stored=bound.dtype, model=lambda s: (s.of(bound.independent), s.of(bound.coherent))
    )
    probe = bounded_probe(output, actual=actual, expected=expected, bound=lambda standard: bound)
    shares = {m.measure: m.use for m in probe.measure(actual, PRECISE.name)}
    stored, size = dtype_name(bound.dtype), expected.numel()
    return [
        Series(output, measure, stored, (error,), (granted[measure],), (shares[measure],), (size,))
        for measure, error in errors.items()
        if measure in shares
    ]


def _joined(first: Series, second: Series) -> Series:
    longer = {n: getattr(first, n) + getattr(second, n) for n in ("errors", "bounds", "shares", "elements")}
    return replace(first, **longer)
