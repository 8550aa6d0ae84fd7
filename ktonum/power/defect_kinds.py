"""The kinds of defects that are planted in tensors that passed a check. Only this module knows all of them."""

from __future__ import annotations

from ktonum.power import arithmetic_defects, element_defects, row_defects, tile_defects, whole_tensor_defects
from ktonum.power.defect import Defect, SizedDefect, Sound

__all__ = ["DEFECTS", "SIZED_DEFECTS", "Defect", "SizedDefect", "Sound"]

#: Kinds with a size. `ktonum.power.planting` searches for the smallest size that is flagged.
SIZED_DEFECTS: tuple[SizedDefect, ...] = (
    whole_tensor_defects.SCALING,
    element_defects.ELEMENT,
    element_defects.ELEMENT_OF_ZEROS,
    row_defects.ROW,
    whole_tensor_defects.DROPPED_TERM,
)

#: Kinds without a size.
DEFECTS: tuple[Defect, ...] = (
    whole_tensor_defects.SIGN,
    whole_tensor_defects.HALVED,
    element_defects.ELEMENT_SIGN,
    element_defects.INTEGER,
    row_defects.ROW_ZERO,
    row_defects.ROW_SIGN,
    tile_defects.STALE_TILE,
    tile_defects.MASK_TOO_SHORT,
    tile_defects.MASK_TOO_FAR,
    arithmetic_defects.TRUNCATED,
    *arithmetic_defects.ROUNDED,
    *arithmetic_defects.ACCUMULATED,
)
