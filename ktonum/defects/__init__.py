"""Kinds of defects, planted in tensors that a check passed. This registry is the only place that knows them all."""

from __future__ import annotations

from ktonum.defects import elements, precision, rows, tiles, whole
from ktonum.defects.defect import Defect, SizedDefect, Sound

__all__ = ["DEFECTS", "SIZED_DEFECTS", "Defect", "SizedDefect", "Sound"]

#: Those of any size: the smallest that is flagged is searched for.
SIZED_DEFECTS: tuple[SizedDefect, ...] = (
    whole.SCALING,
    elements.ELEMENT,
    elements.ELEMENT_OF_ZEROS,
    rows.ROW,
    whole.DROPPED_TERM,
)

#: Those that are there or not.
DEFECTS: tuple[Defect, ...] = (
    whole.SIGN,
    whole.HALVED,
    elements.ELEMENT_SIGN,
    elements.INTEGER,
    rows.ROW_ZERO,
    rows.ROW_SIGN,
    tiles.STALE_TILE,
    tiles.MASK_TOO_SHORT,
    tiles.MASK_TOO_FAR,
    precision.TRUNCATED,
    *precision.ROUNDED,
    *precision.ACCUMULATED,
)
