r"""Errors counted in roundings: measures that do not depend on the scale of a result, and bounds from an error model.

The unit is a rounding in the output's dtype. It follows from the oracle alone, so no measure depends on an absolute
size. The measures use the error :math:`d = actual - expected` and two halves of a unit in the last place: :math:`h` at
the oracle, and :math:`h_r` at the element's typical size :math:`r`:

- ``element``: :math:`\max_i |d_i| / (h_i + h_{r,i})`, unit ``half_ulp``. An element is a sum of terms that may cancel,
  and its error has the size of the terms. The typical size :math:`r` stands for them. It is the root mean square of the
  element's row, times the share of its column if that is above average. So a small row is compared with its own size,
  and a row of exact zeros with zero.
- ``relative_norm``: :math:`\|d\| / \|h\|`, unit ``rounding_norm``. One rounding gives :math:`1/\sqrt 3`.
- ``signed_bias``: :math:`|\langle d, e \rangle| / (\|h\| \|e\|)` with the oracle :math:`e`, unit ``rounding_norm``.
  This part of the error does not average out. Truncation gives about 1 for any number n of elements, and rounding gives
  about :math:`1/\sqrt{3n}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.bounds import confidence
from ktonum.bounds.error_bounds import norm_bound, projection_bound
from ktonum.bounds.formats import spacing
from ktonum.measure.accumulation import ErrorSums, Nonfinite, Worst, same
from ktonum.measure.comparison import unravelled

__all__ = [
    "Errors",
    "Model",
    "Stretch",
    "applicable_measures",
    "derived_tolerances",
    "exceeding_elements",
    "measure_errors",
]

# Number of elements at a time. A dozen float64 tensors of this size are in memory at once.
_BLOCK = 2**22
# Errors of fewer elements than this do not average out, see `ktonum.measure.probe`.
_ENOUGH_TO_AVERAGE = 64
_TINY = torch.finfo(torch.float64).tiny

# A block's (independent, coherent) errors before the final rounding, see `ktonum.bounds.ErrorBound`.
Model = Callable[["Stretch"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Errors:
    """The result of `measure_errors`.

    Attributes:
        values: By measure; all are ``inf`` if an element is wrongly NaN or infinite.
        signed: The signed bias relative to the oracle: −0.0028 means 0.28 % too small.
        norm: ‖actual − expected‖ / ‖expected‖.
        worst: Index of the worst element, or of the first one that is wrongly NaN or infinite.
        nonfinite: The number of elements that are wrongly NaN or infinite.
    """

    values: Mapping[str, float]
    signed: float
    norm: float
    worst: tuple[int, ...]
    nonfinite: int


@dataclass(frozen=True)
class Stretch:
    """Some rows of the oracle as a float64 matrix, whose rows are all leading dims together."""

    rows: slice
    expected: Tensor  # 0 where not finite
    typical: Tensor  # r
    half_ulp: Tensor  # h
    unit: Tensor  # h + h_r
    scale: float  # the oracle's largest element; without it, squares of gradients of 1e-170 would be zero

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of another tensor of the oracle's shape."""
        return _matrix(tensor)[self.rows].to(self.expected.device, torch.float64)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)


def _stretches(expected: Tensor, dtype: torch.dtype) -> Iterator[Stretch]:
    matrix = _matrix(expected)
    count, width = matrix.shape
    at_once = max(1, _BLOCK // width)
    blocks = [slice(i, min(i + at_once, count)) for i in range(0, count, at_once)]

    def part(rows: slice) -> Tensor:
        return matrix[rows].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    largest = max(torch.finfo(dtype).tiny, *(float(part(b).abs().amax()) for b in blocks))
    by_row, by_column = matrix.new_zeros(count, 1), matrix.new_zeros(1, width)
    for rows in blocks:
        squares = (part(rows) / largest).square()
        by_row[rows] = squares.mean(1, keepdim=True)
        by_column += squares.sum(0, keepdim=True) / count
    # The error of a matrix product's element (i, j) is proportional to ‖a_i‖ ‖b_j‖. A column can only raise the row's
    # size, because a column's size that is estimated from few rows may be small by luck.
    share = (by_column / by_column.mean().clamp(min=_TINY)).clamp(min=1.0)
    for rows in blocks:
        e, typical = part(rows), (by_row[rows] * share).sqrt() * largest
        half = spacing(e, dtype) / 2
        yield Stretch(rows, e, typical, half, half + spacing(typical, dtype) / 2, largest)


def measure_errors(*, actual: Tensor, expected: Tensor, stored: torch.dtype) -> Errors:
    """Measure ``actual`` against the float64 oracle of the same shape, in roundings of ``stored``, without thresholds.

    Elements that are NaN in both, or the same infinity, agree and are left out. There must be other elements.
    """
    sums, worst, nonfinite, finite, roundings = ErrorSums(), Worst(), Nonfinite(), 0, 0.0
    for s in _stretches(expected, stored):
        a, start = s.of(actual), s.rows.start * s.expected.shape[1]
        usable = nonfinite.usable(a, s.of(expected), start)
        finite += int(usable.sum())
        error = torch.where(usable, a - s.expected, 0.0)
        # 0/0 is not an error. Another error that is divided by zero is the worst.
        worst.update(torch.where(error == 0, 0.0, error.abs() / s.unit), start)
        sums.add(error / s.scale, s.expected / s.scale)
        roundings += float((torch.where(usable, s.half_ulp, 0.0) / s.scale).square().sum())
    if nonfinite.count:
        infinite = dict.fromkeys(applicable_measures(expected.numel()), math.inf)
        return Errors(infinite, math.nan, math.nan, unravelled(nonfinite.first, expected.shape), nonfinite.count)
    norms, roundings = max(sums.norms, _TINY), max(roundings, _TINY)
    values = {
        "element": worst.value,
        "relative_norm": math.sqrt(sums.squares / roundings),
        "signed_bias": abs(sums.products) / (math.sqrt(roundings) * math.sqrt(norms)),
    }
    values = {name: values[name] for name in applicable_measures(finite)}
    place, norm = unravelled(worst.place, expected.shape), math.sqrt(sums.squares / norms)
    return Errors(values, sums.products / norms, norm, place, 0)


def exceeding_elements(*, actual: Tensor, expected: Tensor, stored: torch.dtype, tolerance: float) -> Tensor:
    """Where the measure ``element`` is beyond ``tolerance``, also by NaN or infinities; bool, the tensors' shape."""
    found = torch.zeros(actual.shape, dtype=torch.bool)
    for s in _stretches(expected, stored):
        a, given = s.of(actual), s.of(expected)
        _matrix(found)[s.rows] = (~((a - given).abs() <= tolerance * s.unit) & ~same(a, given)).cpu()
    return found


def derived_tolerances(*, expected: Tensor, stored: torch.dtype, model: Model) -> dict[str, float]:
    """Bounds on the measures of a result in ``stored``; ``model`` gives its errors before the final rounding.

    The model maps each block to (independent, coherent) errors as in `ktonum.bounds.ErrorBound`. ``expected`` is
    float64.
    """
    count = expected.numel()
    by_element = confidence(count)
    element, sums = 0.0, torch.zeros(6, dtype=torch.float64)
    for s in _stretches(expected, stored):
        independent, shared = model(s)
        allowed = by_element * independent + shared + s.half_ulp
        element = max(element, float(torch.where(s.unit > 0, allowed / s.unit, 1.0).amax()))
        h, i, c, e = (t / s.scale for t in (s.half_ulp, independent, shared, s.expected.abs()))
        a = (i.square() + h.square()).sqrt()
        sums += torch.stack([(x * y).sum() for x, y in ((h, h), (e, e), (a, a), (c, c), (a * e, a * e), (c, e))]).cpu()
    roundings, norms, variance, coherent, projected, shifted = sums.clamp(min=_TINY).tolist()
    norm = norm_bound(variance=variance, coherent_squares=coherent, count=count)
    projection = projection_bound(variance=projected, coherent=shifted)
    granted = {
        "element": element,
        "relative_norm": norm / math.sqrt(roundings),
        "signed_bias": projection / (math.sqrt(roundings) * math.sqrt(norms)),
    }
    return {name: granted[name] for name in applicable_measures(count)}


def applicable_measures(count: int) -> list[str]:
    """The measures that make sense for ``count`` elements: one element needs no norm, and few do not average out."""
    return [
        m for m, least in (("element", 1), ("relative_norm", 2), ("signed_bias", _ENOUGH_TO_AVERAGE)) if count >= least
    ]
