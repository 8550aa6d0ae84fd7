"""Error measures between a result and its oracle. No thresholds here: see `ktonum.bounds` for those."""

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

# Elements compared at a time: float64 temporaries of a 151,936 × 4,096 gradient would not fit beside it.
_BLOCK = 2**24


@dataclass(frozen=True)
class Comparison:
    """How far ``actual`` is from ``expected``; all figures are pure numbers.

    Attributes:
        relative_norm: ‖actual − expected‖ / ‖expected‖, Euclidean; ``inf`` when only ``expected`` is zero.
        signed_bias: ⟨actual − expected, expected⟩ / ⟨expected, expected⟩: the share of the error that does not average
            out. 0.01 means one per cent too long.
        max_absolute: The largest |actual − expected|.
        max_ulp: The largest error in units of the last place that ``dtype`` has at ``expected``.
        worst_index: Where ``max_ulp`` is reached.
        nonfinite: Elements that are NaN or infinite in one of the two and not the same in the other; if there are
            any, all errors are ``inf`` and ``worst_index`` is the first of them.
        elements: How many elements were compared.
    """

    relative_norm: float
    signed_bias: float
    max_absolute: float
    max_ulp: float
    worst_index: tuple[int, ...]
    nonfinite: int
    elements: int


def blocks(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Equal stretches of the flattened tensors, with the offset of each."""
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _BLOCK):
        yield start, tuple(f[start : start + _BLOCK] for f in flat)


def compare(*, actual: Tensor, expected: Tensor, dtype: torch.dtype | str | None = None) -> Comparison:
    """Measure ``actual`` against ``expected``, in float64.

    Args:
        actual: The result under audit, any floating dtype.
        expected: The oracle, same shape; float64 to be of use.
        dtype: The dtype whose units in the last place ``max_ulp`` counts; default that of ``actual``.

    Raises:
        InputError: Shapes differ, or a tensor is not floating.
    """
    if actual.shape != expected.shape:
        raise InputError(
            f"actual has shape {tuple(actual.shape)} and expected {tuple(expected.shape)}: compare like with like"
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
    """The index, in row-major order, of the ``flat``-th element of a tensor of that shape.

    Without `torch.unravel_index`, which takes half as long as all three measures of a small tensor.
    """
    index = []
    for size in reversed(shape):
        index.append(flat % size if size else 0)
        flat //= max(1, size)
    return tuple(reversed(index))
