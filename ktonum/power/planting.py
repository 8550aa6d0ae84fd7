"""Power: which planted defects a probe flags, and from what size on, found by planting them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from ktonum.measure.comparison import blocks
from ktonum.measure.probe import Probe
from ktonum.power.defect_kinds import DEFECTS, SIZED_DEFECTS, SizedDefect, Sound
from ktonum.results import Power

__all__ = ["power_of"]

# Sizes tried, smallest and largest: from below float64's roundoff to a defect nobody could overlook.
_SMALLEST, _LARGEST = 1e-17, 4.0
# The search stops when the size is known to this factor.
_RESOLUTION = 1.5


def power_of(probe: Probe, standard: str) -> tuple[Power, ...]:
    """What the probe makes of every kind of defect that applies to its tensor.

    A defect is planted in the tensor that the candidate made, and the very measurements of the check are taken again.
    """
    sound = Sound(probe.actual, None if probe.expectation is None else probe.expectation(standard).expected)
    powers = [power for kind in SIZED_DEFECTS for power in _of_size(probe, standard, sound, kind)]
    for defect in DEFECTS:
        planted = defect.plant(sound)
        # What leaves the tensor as it was is no defect of it.
        if planted is not None and _differs(planted, sound.actual):
            flagged = _use(probe, standard, planted) is not None
            powers.append(Power(f"{probe.name}: {defect.words}", 1.0 if flagged else None))
    return tuple(powers)


def _differs(planted: Tensor, actual: Tensor) -> bool:
    return any(bool(((p != a) & ~((p != p) & (a != a))).any()) for _, (p, a) in blocks(planted, actual))


def _use(probe: Probe, standard: str, planted: Tensor) -> float | None:
    """The largest share of its bound that a measurement of the planted tensor uses; None where none flags it."""
    return max((m.use for m in probe.measure(planted, standard) if not m.within), default=None)


def _of_size(probe: Probe, standard: str, sound: Sound, kind: SizedDefect) -> Iterator[Power]:
    """The smallest flagged size to a factor of `_RESOLUTION`; nothing where the kind does not apply."""
    planted = kind.plant(sound, _LARGEST)
    if planted is None:
        return
    words = f"{probe.name}: {kind.words}"
    largest = _use(probe, standard, planted)
    if largest is None:
        yield Power(words, None)
        return

    def flagged(size: float) -> bool:
        planted = kind.plant(sound, size)
        return planted is not None and _use(probe, standard, planted) is not None

    low, high = _SMALLEST, _LARGEST
    # Errors grow in proportion to the defect: where little is rounded, this size is about the smallest.
    guess = _LARGEST / largest
    for size in (guess * math.sqrt(_RESOLUTION), guess / math.sqrt(_RESOLUTION)):
        if low < size < high:
            low, high = (low, size) if flagged(size) else (size, high)
    yield Power(words, _bisected(flagged, low, high))


def _bisected(flagged: Callable[[float], bool], low: float, high: float) -> float:
    """Bisection of the size's logarithm between one that is not flagged, ``low``, and one that is."""
    while high / low > _RESOLUTION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if flagged(middle) else (middle, high)
    return high
