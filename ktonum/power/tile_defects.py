"""Defects at the edges of tiles and masks, along the rows. Each element of a vector is a row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ktonum.power.defect import Defect, Sound

__all__ = ["MASK_TOO_FAR", "MASK_TOO_SHORT", "STALE_TILE"]

# The smallest side of a tile for tensor cores.
_TILE = 16


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def _stale(sound: Sound) -> Tensor | None:
    """The last rows have the values of the rows before them, like a buffer that was not filled again."""
    if not sound.floating or sound.actual.dim() == 0:
        return None
    planted = sound.copy()
    rows = _matrix(planted)
    tile = min(_TILE, rows.shape[0] // 2)
    if tile == 0:
        return None
    rows[-tile:] = rows[-2 * tile : -tile].clone()
    return planted


def _beside_the_mask(rows: Tensor) -> tuple[int, int] | None:
    """The index of the first zero row that is next to a row that is not zero, and the index of that row."""
    live = (rows != 0).any(1)
    edges = (live[1:] != live[:-1]).nonzero()
    if not edges.numel():
        return None
    first = int(edges[0])
    return (first + 1, first) if bool(live[first]) else (first, first + 1)


def _mask_too_short(sound: Sound) -> Tensor | None:
    """A row that should be zero gets the values of the row next to it."""
    return _masked(sound, lambda rows, zero, live: rows[zero].copy_(rows[live]))


def _mask_too_far(sound: Sound) -> Tensor | None:
    """A row next to one that should be zero becomes zero too."""
    return _masked(sound, lambda rows, zero, live: rows[live].zero_())


def _masked(sound: Sound, change: Callable[[Tensor, int, int], Tensor]) -> Tensor | None:
    if not sound.floating or sound.actual.dim() == 0:
        return None
    planted = sound.copy()
    rows = _matrix(planted)
    found = _beside_the_mask(rows)
    if found is None:
        return None
    change(rows, *found)
    return planted


STALE_TILE = Defect("last tile stale", _stale)
MASK_TOO_SHORT = Defect("mask one row short", _mask_too_short)
MASK_TOO_FAR = Defect("mask one row too far", _mask_too_far)
