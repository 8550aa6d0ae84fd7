"""Defects of one row of middle size. A norm over thousands of rows can hide them."""

from __future__ import annotations

from torch import Tensor

from ktonum.power.defect import Defect, SizedDefect, Sound

__all__ = ["ROW", "ROW_SIGN", "ROW_ZERO"]


def _scaled(sound: Sound, factor: float) -> Tensor | None:
    if sound.row is None:
        return None
    planted = sound.copy()
    row = sound.matrix(planted)[sound.row]
    row.copy_(row.double() * factor)
    return planted


ROW = SizedDefect("one row", "scaled by 1 + size", lambda sound, size: _scaled(sound, 1 + size))
ROW_ZERO = Defect("one row zero", lambda sound: _scaled(sound, 0.0))
ROW_SIGN = Defect("one row's sign flipped", lambda sound: _scaled(sound, -1.0))
