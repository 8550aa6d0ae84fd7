"""Defects of every element: a missing factor, a wrong sign, or a term that is missing from all sums."""

from __future__ import annotations

from torch import Tensor

from ktonum.power.defect import Defect, SizedDefect, Sound, changed_elements, signs

__all__ = ["DROPPED_TERM", "HALVED", "SCALING", "SIGN"]


def _scaled(sound: Sound, factor: float) -> Tensor | None:
    return changed_elements(sound.actual, lambda block, start: block * factor) if sound.root_mean_square else None


def _short_of_a_term(sound: Sound, size: float) -> Tensor | None:
    """The missing term of each element is proportional to the element, and its sign is independent of the element's."""
    if not sound.root_mean_square or sound.actual.numel() < 2:
        return None
    return changed_elements(
        sound.actual, lambda block, start: block * (1 - size * signs(start, block.numel(), block.device))
    )


SCALING = SizedDefect("scaling", "by 1 + size", lambda sound, size: _scaled(sound, 1 + size))
DROPPED_TERM = SizedDefect("a term missing", "of size × each element, of either sign", _short_of_a_term)
SIGN = Defect("sign flipped", lambda sound: _scaled(sound, -1.0))
HALVED = Defect("halved", lambda sound: _scaled(sound, 0.5))
