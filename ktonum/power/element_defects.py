"""Defects of one element."""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.power.defect import Defect, SizedDefect, Sound

__all__ = ["ELEMENT", "ELEMENT_OF_ZEROS", "ELEMENT_SIGN", "INTEGER"]


def _moved(sound: Sound, distance: float) -> Tensor:
    """``distance`` is added to the middle element, which is not a corner case, or else to the first finite one."""
    planted = sound.copy()
    flat = planted.view(-1)
    place = flat.numel() // 2
    if not bool(flat[place].isfinite()):
        place = int(flat.isfinite().byte().argmax())
    flat[place] = flat[place].double() + distance
    return planted


def _moved_by_share(sound: Sound, size: float) -> Tensor | None:
    usable = sound.root_mean_square and sound.actual.numel() > 1
    return _moved(sound, size * sound.root_mean_square) if usable else None


def _moved_from_zero(sound: Sound, size: float) -> Tensor | None:
    return _moved(sound, size) if sound.floating and not sound.root_mean_square else None


def _sign_of_one(sound: Sound) -> Tensor | None:
    if sound.element is None or sound.actual.numel() < 2:
        return None
    planted = sound.copy()
    planted.view(-1)[sound.element] *= -1
    return planted


def _integer(sound: Sound) -> Tensor | None:
    if sound.actual.is_floating_point() or not sound.actual.numel():
        return None
    planted = sound.copy()
    flat = planted.view(-1)
    middle = flat.numel() // 2
    flat[middle] = ~flat[middle] if planted.dtype == torch.bool else flat[middle] + 1
    return planted


ELEMENT = SizedDefect("one element", "off by size × its root mean square", _moved_by_share)
#: If all elements are zero, the size is absolute.
ELEMENT_OF_ZEROS = SizedDefect("one element", "off by size × one", _moved_from_zero)
ELEMENT_SIGN = Defect("one element's sign flipped", _sign_of_one)
INTEGER = Defect("one element off by one", _integer)
