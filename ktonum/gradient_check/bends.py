"""Kinks and jumps at a point, from how fast the bend of a function falls with the step.

The bend is ``|phi(h) + phi(-h) - 2 phi(0)|``. A central difference alone sees neither a kink nor a jump at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["jump", "kink_slope"]


def kink_slope(bends: Sequence[tuple[float, float]]) -> float:
    """The difference of the one-sided slopes at 0, or 0.0 if there is no sign of a kink.

    A central difference does not see a kink at 0, because it converges to the mean of the two slopes. The bend
    ``|phi(h) + phi(-h) - 2 phi(0)|`` does. It is of order h^2 where phi is smooth, of order h at a kink, and constant
    where rounding dominates. So from step to smaller step, bend / h falls, stays or rises. If it stays over three
    neighbouring steps, there is a kink. Where curvature gives way to noise, it stays over two steps at most.

    Args:
        bends: Pairs ``(step, bend)``; those with a bend that is not finite are dropped.
    """
    slopes = [bend / step for step, bend in sorted(bends) if math.isfinite(bend)]
    plateaus = [
        middle
        for low, middle, high in zip(slopes, slopes[1:], slopes[2:], strict=False)
        if 0.0 < max(low, middle, high) <= 1.5 * min(low, middle, high)
    ]
    return min(plateaus, default=0.0)


def jump(bends: Sequence[tuple[float, float]]) -> float:
    """The distance of ``phi(0)`` from the values around it, or 0.0 if phi seems to be continuous at 0.

    The bend, see `kink_slope`, becomes smaller with the step if phi is continuous. If phi jumps at 0 it stays.

    Args:
        bends: Pairs ``(step, bend)``. Non-finite pairs are dropped.
    """
    smallest = [bend for _, bend in sorted(bends) if math.isfinite(bend)][:3]
    level = len(smallest) == 3 and 0.0 < max(smallest) <= 1.01 * min(smallest)
    return min(smallest) if level else 0.0
