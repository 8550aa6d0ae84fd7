"""Where an error is: describes the set of elements that exceed their bound.

It takes plain tensors and returns words. It does not know ops, checks or bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Place", "dim_names", "find_place"]

# The fewest indices of a series, because any two indices have a constant distance.
_FEWEST_OF_A_SERIES = 3
# Indices are described as a range if they make up more than this share of it.
_RUN = 0.75
# The most elements or indices that are listed.
_LISTED = 4


@dataclass(frozen=True)
class Place:
    """The place where elements exceed their bounds.

    Attributes:
        words: A description, e.g. ``the last tile along dim 0, from 256 on``.
        indices: The indices of the place along each dim. Their product contains every exceeding element.
        everywhere: Whether this product is the whole tensor.
    """

    words: str
    indices: tuple[Sequence[int], ...]
    everywhere: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the same shape that is at this place."""
        for dim, kept in enumerate(self.indices):
            if len(kept) < tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.tensor(list(kept), device=tensor.device))
        return tensor


@dataclass(frozen=True)
class _Along:
    """The indices along one dim at which elements exceed their bounds, and words for them (empty for all indices)."""

    indices: Sequence[int]
    words: str = ""
    listed: bool = False


def _any(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tensor.any(dim=dims) if dims else tensor


def find_place(exceeding: Tensor, names: Sequence[str] = (), free: Tensor | None = None) -> Place:
    """Describe a set of elements of a tensor.

    Some elements of a wrong tile may be right by luck. So a gap at either end of a dim is treated as part of the set if
    it is no longer than the longest gap inside the set.

    Args:
        exceeding: True for each element of the set; any shape.
        names: A name for each dim; by default ``dim 0``, ``dim 1``, ...
        free: True for elements that cannot show an error, such as zeros of masked tokens; same shape. A dim counts as
            filled if the set includes every index that has other elements.
    """
    shape, count = exceeding.shape, int(exceeding.sum())
    whole = tuple(range(size) for size in shape)
    if count == 0:
        return Place("all elements together: no single element exceeds its bound", whole, True)
    if not shape:
        return Place("the only element", whole, True)
    called = [names[d] if d < len(names) and names[d] else f"dim {d}" for d in range(len(shape))]
    if count == 1:
        index = [int(i) for i in exceeding.nonzero()[0]]
        words = "the only element" if exceeding.numel() == 1 else f"element {index}"
        return Place(words, tuple((i,) for i in index), exceeding.numel() == 1)
    others = [tuple(o for o in range(len(shape)) if o != d) for d in range(len(shape))]
    touched = [_any(exceeding, o) for o in others]
    if free is not None:
        shown = [_any(~free, o) for o in others]
        touched = [torch.ones_like(t) if bool((t | ~s).all()) else t for t, s in zip(touched, shown, strict=True)]
    along = [_along(t.nonzero().flatten(), shape[d], called[d]) for d, t in enumerate(touched)]
    indices = tuple(a.indices for a in along)
    inside = Place("", indices, False)
    size = math.prod(len(kept) for kept in indices)
    if free is not None:
        size -= int((inside.of(free) & ~inside.of(exceeding)).sum())
    everywhere = all(len(kept) == size for kept, size in zip(indices, shape, strict=True))
    if len(shape) > 1 and 2 * count < size:
        series = _series(exceeding.reshape(-1).nonzero().flatten(), exceeding.numel())
        if series is not None:
            return Place(f"{series} in memory", indices, everywhere)
    if count <= _LISTED and count < size:
        words = f"elements {', '.join(str(i) for i in exceeding.nonzero().tolist())}"
    elif 2 * count >= size and not (len(shape) == 1 and along[0].listed):
        words = "everywhere" if everywhere else _joined(along, shape)
    else:
        among = "" if everywhere or len(shape) == 1 else f", within {_joined(along, shape)}"
        words = f"scattered: {count} of {exceeding.numel()} elements{among}"
    return Place(words, indices, everywhere)


def dim_names(shape: Sequence[int], dims: Mapping[str, int]) -> tuple[str, ...]:
    """``dim 0 (B)`` if exactly one name in ``dims`` has the size of the dim and no other dim has it, else ``dim 0``."""
    names = []
    for d, size in enumerate(shape):
        fitting = [name for name, of in dims.items() if of == size]
        alone = len(fitting) == 1 and list(shape).count(size) == 1
        names.append(f"dim {d} ({fitting[0]})" if alone else f"dim {d}")
    return tuple(names)


def _joined(along: Sequence[_Along], shape: torch.Size) -> str:
    """Words for the dims that the place does not fill; ``row`` or ``column`` if it is one."""
    partial = [d for d, a in enumerate(along) if len(a.indices) < shape[d]]
    single = [d for d in partial if len(along[d].indices) == 1]
    if len(shape) > 1 and partial == single:
        at = [along[d].indices[0] for d in single]
        if partial == list(range(len(shape) - 1)):
            return f"row {at[0] if len(at) == 1 else at}"
        if partial == [len(shape) - 1]:
            return f"column {at[0]}"
    return ", ".join(along[d].words for d in partial)


def _along(found: Tensor, size: int, name: str) -> _Along:
    start, stop = int(found[0]), int(found[-1]) + 1
    if found.numel() == 1:
        return _Along((start,), f"index {start} along {name}" if size > 1 else "")
    series = _series(found, size)
    if series is not None:
        return _Along(tuple(found.tolist()), f"{series} along {name}")
    gap = int(found.diff().amax()) - 1
    if found.numel() > _RUN * (stop - start):
        start = 0 if start <= gap else start
        stop = size if size - stop <= gap else stop
        return _Along(range(start, stop), _run(start, stop, size, name))
    listed = ", ".join(map(str, found[:_LISTED].tolist())) + ", ..." * (found.numel() > _LISTED)
    words = f"{found.numel()} of {size} indices along {name}: {listed}"
    return _Along(tuple(found.tolist()), words, listed=True)


def _run(start: int, stop: int, size: int, name: str) -> str:
    """Words for a range of indices; a tile's length is a power of two, and it begins at a multiple of its length."""
    if (start, stop) == (0, size):
        return ""
    if stop == size and 2 * start < size:
        return f"from {start} on along {name}"
    if stop == size:
        return f"the last tile along {name}, from {start} on"
    if start == 0:
        return f"the first tile along {name}, up to {stop - 1}"
    length = stop - start
    tile = length & (length - 1) == 0 and start % length == 0
    return f"{'the tile' if tile else 'indices'} {start} to {stop - 1} along {name}"


def _series(found: Tensor, size: int) -> str | None:
    """Words for every nth index from the beginning to the end; None if the indices are not such a series."""
    if found.numel() < _FEWEST_OF_A_SERIES:
        return None
    first, last, step = int(found[0]), int(found[-1]), int(found[1] - found[0])
    if step < 2 or first >= step or size - last > step or bool((found.diff() != step).any()):
        return None
    return f"every {_ordinal(step)} element, from {first} on,"


def _ordinal(n: int) -> str:
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
