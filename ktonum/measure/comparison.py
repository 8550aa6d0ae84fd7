"""Error measures between a result and its oracle, without thresholds. `ktonum.bounds` has those."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.bounds.formats import spacing
from ktonum.declare.cases import DTYPES, torch_dtype
from ktonum.errors import InputError
from ktonum.measure.accumulation import ErrorSums, Nonfinite, Worst

__all__ = ["Comparison", "blocks", "compare", "unravelled"]

# Number of elements compared at a time. Float64 copies of a whole 151,936 × 4,096 gradient would not fit into memory.
_BLOCK = 2**24


@dataclass(frozen=True)
class Comparison:
    """How far ``actual`` is from ``expected``; all figures are plain numbers.

    Attributes:
        relative_norm: ‖actual − expected‖ / ‖expected‖, Euclidean; ``inf`` if only ``expected`` is zero.
        signed_bias: ⟨actual − expected, expected⟩ / ⟨expected, expected⟩: the share of the error that does not average
            out. 0.01 means that ``actual`` is one per cent too large.
        max_absolute: The largest |actual − expected|.
        max_ulp: The largest error in units in the last place, those of ``dtype`` at ``expected``.
        worst_index: The index of the element with the error ``max_ulp``.
        nonfinite: The number of elements that are NaN or infinite in one tensor and not the same in the other. If it is
            not zero, all errors are ``inf`` and ``worst_index`` is the first such element.
        elements: The number of elements compared.
    """

    relative_norm: float
    signed_bias: float
    max_absolute: float
    max_ulp: float
    worst_index: tuple[int, ...]
    nonfinite: int
    elements: int


def blocks(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The same blocks of the flattened tensors, each with its offset."""
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _BLOCK):
        yield start, tuple(f[start : start + _BLOCK] for f in flat)


def compare(*, actual: Tensor, expected: Tensor, dtype: torch.dtype | str | None = None) -> Comparison:
    """Measure ``actual`` against ``expected``, in float64.

    Args:
        actual: The result under audit, any floating dtype.
        expected: The oracle, in the same shape; it should be float64.
        dtype: The dtype whose units in the last place ``max_ulp`` counts; by default that of ``actual``.

    Raises:
        InputError: Shapes differ, a tensor is not floating, or the dtype's name is unknown.
    """
    if actual.shape != expected.shape:
        raise InputError(
            f"actual has shape {tuple(actual.shape)} and expected {tuple(expected.shape)}: pass tensors of one shape"
        )
    if not (actual.is_floating_point() and expected.is_floating_point()):
        raise InputError(f"actual is {actual.dtype} and expected {expected.dtype}: pass floating tensors")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}, or a torch dtype")
        dtype = torch_dtype(dtype)
    unit = dtype or actual.dtype
    sums, worst, nonfinite, max_absolute = ErrorSums(), Worst(), Nonfinite(), 0.0
    for start, (a, e) in blocks(actual.detach(), expected.detach()):
        a, e = a.double(), e.double()
        usable = nonfinite.usable(a, e, start)
        error, e = torch.where(usable, a - e, 0.0), torch.where(usable, e, 0.0)
        sums.add(error, e)
        worst.update(error.abs() / spacing(e, unit), start)
        max_absolute = max(max_absolute, float(error.abs().amax()))
    if nonfinite.count:
        index = unravelled(nonfinite.first, actual.shape)
        return Comparison(math.inf, math.inf, math.inf, math.inf, index, nonfinite.count, actual.numel())
    return Comparison(
        relative_norm=sums.relative_norm,
        signed_bias=sums.signed_bias,
        max_absolute=max_absolute,
        max_ulp=worst.value,
        worst_index=unravelled(worst.place, actual.shape),
        nonfinite=0,
        elements=actual.numel(),
    )


def unravelled(flat: int, shape: torch.Size) -> tuple[int, ...]:
    """The index of the element with the flat index ``flat``, in row-major order, in a tensor of that shape.

    `torch.unravel_index` is slower: it takes half as long as all three measures of a small tensor.
    """
    index = []
    for size in reversed(shape):
        index.append(flat % size if size else 0)
        flat //= max(1, size)
    return tuple(reversed(index))
