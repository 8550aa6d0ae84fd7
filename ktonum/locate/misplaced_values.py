"""Signatures of right values in the wrong place: stale or repeated blocks; shifted, reversed or transposed tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.locate.failing_part import Part, fits

__all__ = ["misplaced", "repeated"]

# The most slices that are compared with each other, because each pair needs a distance.
_MOST_SLICES = 1024
# Fewer numbers than this can be in a certain order by chance.
_FEWEST = 3
# The largest shift of a whole tensor that is tried, in both directions.
_SHIFTS = 4


def repeated(part: Part) -> str | None:
    """A block with the values of another place along one dim: it is stale, or it was written twice."""
    if part.whole is None or part.start is None or part.count < 2:
        return None
    expected = part.whole.expected
    for dim, length in enumerate(part.actual.shape):
        size = expected.shape[dim]
        if length == size or size > _MOST_SLICES:
            continue
        beside = expected
        for other, (start, extent) in enumerate(zip(part.start, part.actual.shape, strict=True)):
            if other != dim:
                beside = beside.narrow(other, start, extent)
        # Try the previous block first: a buffer that was not filled again still has its values.
        places = sorted(range(size - length + 1), key=lambda s: abs(part.start[dim] - length - s))  # type: ignore[index]
        for start in places:
            if start != part.start[dim] and fits(part, beside.narrow(dim, start, length)):
                last = f" to {start + length - 1}" if length > 1 else ""
                return f"stale or repeated: the values of {start}{last} along dim {dim}"
    return None


def misplaced(part: Part) -> str | None:
    """The right slices in another order (shifted, reversed or permuted), or the transposed matrix."""
    part = part.whole or part  # the order includes slices that are in their right place
    actual, expected = part.actual, part.expected
    if part.count < _FEWEST:
        return None
    for dim, size in enumerate(actual.shape):
        if size < 2:
            continue
        for shift in [s * sign for s in range(1, min(size, _SHIFTS + 1)) for sign in (1, -1)]:
            if fits(part, expected.roll(shift, dim)):
                return f"shifted along dim {dim} by {shift}, the rest wrapped round"
            if _fits_inside(part, dim, shift):
                return f"shifted along dim {dim} by {shift}"
        if fits(part, expected.flip(dim)):
            return f"reversed along dim {dim}"
        order = _order(actual, expected, dim)
        if order is not None and fits(part, expected.index_select(dim, order)):
            return f"indices along dim {dim} permuted: {_listed(order)}"
    if actual.dim() >= 2 and min(actual.shape[-2:]) > 1 and fits(part, expected.mT.reshape(expected.shape)):
        return "transposed in its last two dims"
    return None


def _fits_inside(part: Part, dim: int, shift: int) -> bool:
    """Whether the slices that were moved within the tensor fit. The slices that came in at the end may be anything."""
    size = part.actual.shape[dim] - abs(shift)
    to, source = max(shift, 0), max(-shift, 0)
    if part.count // part.actual.shape[dim] * size < _FEWEST:
        return False
    inside = Part(
        part.actual.narrow(dim, to, size),
        part.expected.narrow(dim, to, size),
        part.tolerance.narrow(dim, to, size),
        part.exceeding.narrow(dim, to, size),
        part.dtype,
    )
    return bool(inside.exceeding.any()) and fits(inside, part.expected.narrow(dim, source, size))


def _order(actual: Tensor, expected: Tensor, dim: int) -> Tensor | None:
    """For each slice of ``actual`` the nearest one of ``expected``.

    None if slices are single numbers, or too many, or if the result is not a permutation.
    """
    size = actual.shape[dim]
    if size > _MOST_SLICES or actual.numel() < 2 * size:
        return None
    mine, right = (t.movedim(dim, 0).reshape(size, -1) for t in (actual, expected))
    order = torch.cdist(mine, right).argmin(1)
    return order if len(set(order.tolist())) == size else None


def _listed(order: Tensor) -> str:
    moved = [(i, o) for i, o in enumerate(order.tolist()) if i != o]
    words = ", ".join(f"{i} holds {o}" for i, o in moved[:4])
    return words + ", ..." * (len(moved) > 4)
