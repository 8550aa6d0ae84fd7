"""Power: plants defects to find out which of them a probe flags, and from what size on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from ktonum.measure.comparison import blocks
from ktonum.measure.probe import Probe
from ktonum.power.defect_kinds import DEFECTS, SIZED_DEFECTS, SizedDefect, Sound
from ktonum.results import Power

__all__ = ["power_of"]

# The smallest and the largest size that are tried, from below float64's roundoff to a defect that is obvious.
_SMALLEST, _LARGEST = 1e-17, 4.0
# The search ends when the size is known within this factor.
_RESOLUTION = 1.5


def power_of(probe: Probe, standard: str) -> tuple[Power, ...]:
    """The power of a probe for every kind of defect that applies to its tensor.

    Each defect is planted in the tensor that the candidate returned, and the check's own measurements are repeated.

    Args:
        probe: A probe whose measurements are all within their bounds.
        standard: The standard that the candidate is held to.

    Returns:
        For a kind with a size: the smallest size that is flagged, or None if none is. For a kind without a size: 1.0 if
        it is flagged, otherwise None.
    """
    sound = Sound(probe.actual, None if probe.expectation is None else probe.expectation(standard).expected)
    powers = [power for kind in SIZED_DEFECTS for power in _of_size(probe, standard, sound, kind)]
    for defect in DEFECTS:
        planted = defect.plant(sound)
        # If the planted tensor equals the sound one, it has no defect.
        if planted is not None and _differs(planted, sound.actual):
            flagged = _use(probe, standard, planted) is not None
            powers.append(Power(probe.tensor, defect.name, "", 1.0 if flagged else None, probe.context))
    return tuple(powers)


def _differs(planted: Tensor, actual: Tensor) -> bool:
    return any(bool(((p != a) & ~((p != p) & (a != a))).any()) for _, (p, a) in blocks(planted, actual))


def _use(probe: Probe, standard: str, planted: Tensor) -> float | None:
    """The largest error of the planted tensor as a multiple of its bound; None if all errors are within bounds."""
    return max((m.use for m in probe.measure(planted, standard) if not m.within), default=None)


def _of_size(probe: Probe, standard: str, sound: Sound, kind: SizedDefect) -> Iterator[Power]:
    """The smallest flagged size, within a factor of `_RESOLUTION`; nothing if the kind does not apply."""
    planted = kind.plant(sound, _LARGEST)
    if planted is None:
        return
    power = Power(probe.tensor, kind.name, kind.unit, None, probe.context)
    largest = _use(probe, standard, planted)
    if largest is None:
        yield power
        return

    def flagged(size: float) -> bool:
        planted = kind.plant(sound, size)
        return planted is not None and _use(probe, standard, planted) is not None

    low, high = _SMALLEST, _LARGEST
    # Errors are nearly proportional to the size of the defect. So this is about the smallest flagged size, unless much
    # of the defect is rounded away.
    guess = _LARGEST / largest
    for size in (guess * math.sqrt(_RESOLUTION), guess / math.sqrt(_RESOLUTION)):
        if low < size < high:
            low, high = (low, size) if flagged(size) else (size, high)
    yield replace(power, size=_bisected(flagged, low, high))


def _bisected(flagged: Callable[[float], bool], low: float, high: float) -> float:
    """Bisection of the logarithm of the size, between ``low``, which is not flagged, and ``high``, which is."""
    while high / low > _RESOLUTION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if flagged(middle) else (middle, high)
    return high
