"""Where an error is: the shape of the set of elements that exceed their bound.

Plain tensors in, words out: nothing here knows of ops, checks or bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Place", "dim_names", "find_place"]

# Fewer indices than this are no series: any two have a distance.
_FEWEST_OF_A_SERIES = 3
# Indices that take up more than this share of a stretch are a stretch.
_RUN = 0.75
# Up to this many elements are listed.
_LISTED = 4


@dataclass(frozen=True)
class Place:
    """Where elements exceed their bounds.

    Attributes:
        words: For a reader, e.g. ``the last tile along dim 0, from 256 on``.
        indices: For each dim the indices that the place takes up; their product holds every exceeding element.
        everywhere: Whether that product is the whole tensor.
    """

    words: str
    indices: tuple[Sequence[int], ...]
    everywhere: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the same shape that the place takes up."""
        for dim, kept in enumerate(self.indices):
            if len(kept) < tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.tensor(list(kept), device=tensor.device))
        return tensor


@dataclass(frozen=True)
class _Along:
    """The indices of one dim among which elements exceed, and how to call them; no words: all of them."""

    indices: Sequence[int]
    words: str = ""
    listed: bool = False


def _any(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tensor.any(dim=dims) if dims else tensor


def find_place(exceeding: Tensor, names: Sequence[str] = (), free: Tensor | None = None) -> Place:
    """The shape of a set of elements.

    A gap at an end of a dim that is no longer than the longest gap inside is taken for part of the set: some elements
    of a wrong tile are right by luck.

    Args:
        exceeding: True for each element of the set; any shape.
        names: How dims are called, one for each; ``dim 0`` and so on by default.
        free: True for elements that no error could show in, such as zeros of masked tokens; a dim of which nothing else
            is left counts as filled.
    """
    shape, count = exceeding.shape, int(exceeding.sum())
    whole = tuple(range(size) for size in shape)
    if count == 0:
        return Place("all of them together: no element exceeds its own bound", whole, True)
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
    """``dim 0 (B)`` where one of the sizes in ``dims``, and only one, is that of the dim."""
    names = []
    for d, size in enumerate(shape):
        fitting = [name for name, of in dims.items() if of == size]
        alone = len(fitting) == 1 and list(shape).count(size) == 1
        names.append(f"dim {d} ({fitting[0]})" if alone else f"dim {d}")
    return tuple(names)


def _joined(along: Sequence[_Along], shape: torch.Size) -> str:
    """Words of the dims that the place does not fill; a row or a column has a name of its own."""
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
    """Indices in a row; tiles begin at a multiple of their size, or at the end of what whole ones cover."""
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
    """Every nth index from the beginning to the end, or None."""
    if found.numel() < _FEWEST_OF_A_SERIES:
        return None
    first, last, step = int(found[0]), int(found[-1]), int(found[1] - found[0])
    if step < 2 or first >= step or size - last > step or bool((found.diff() != step).any()):
        return None
    return f"every {_ordinal(step)} element, from {first} on,"


def _ordinal(n: int) -> str:
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
