"""Finds the wrong element after a gradient check has failed.

The mismatch ``<g, d> - D`` is linear in the direction. So the set of moved elements is halved again and again, and the
mismatch of one half gives that of the other. One plain central difference at the sharpest step is enough for each
halving, because a detected defect is usually far larger than the error of such a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ktonum.gradient_check.contraction import Contraction
from ktonum.gradient_check.result import Location
from ktonum.measure.comparison import unravelled

__all__ = ["localise", "search_evaluations"]


def search_evaluations(direction: torch.Tensor) -> int:
    """The most forward evaluations that `localise` needs to find an element of this direction alone."""
    return 2 * math.ceil(math.log2(max(direction.numel(), 1))) + 4


def localise(
    contraction: Contraction,
    directions: Mapping[int, torch.Tensor],
    slope: Callable[[int, torch.Tensor], float],
    *,
    mismatch: float,
    step: float,
    tolerance: float,
    budget: int,
) -> Location:
    """The input that causes a mismatch, and the element if a single one does.

    Args:
        contraction: The checked function; its outputs contracted to one number.
        directions: Directions of the failed probe by input position, float64, in the shape of the input.
        slope: The analytic derivative along a direction of the tensor at a position.
        mismatch: The signed mismatch of the failed probe, analytic minus finite difference.
        step: Step for single central differences.
        tolerance: Error of such a difference. A smaller mismatch of a part is not trusted.
        budget: The most forward evaluations. With fewer than two for each input of the probe, inputs are not compared.

    Returns:
        The location. Its index is None if many elements are wrong or the budget ran out.
    """
    start = contraction.function.calls

    def left() -> int:
        return budget - (contraction.function.calls - start)

    def mismatch_of(position: int, low: int, high: int) -> float:
        part = torch.zeros_like(directions[position])
        part.view(-1)[low:high] = directions[position].reshape(-1)[low:high]
        return slope(position, part) - contraction.half_difference({position: part}, step)[0] / step

    parts = {p: mismatch for p in directions}
    if len(directions) > 1 and left() >= 2 * len(directions):
        parts = {p: mismatch_of(p, 0, d.numel()) for p, d in directions.items()}
    position = max(parts, key=lambda p: abs(parts[p]) if math.isfinite(parts[p]) else math.inf)
    low, high, here = 0, directions[position].numel(), parts[position]
    measured = False
    # The last two evaluations are kept to measure the single element, because `here` may be a remainder of other parts.
    while high - low > 1 and left() >= 4 and abs(here) > tolerance:
        middle = (low + high) // 2
        first = mismatch_of(position, low, middle)
        second = here - first
        low, high, here = (low, middle, first) if abs(first) >= abs(second) else (middle, high, second)
    if high - low == 1 and left() >= 2:
        here, measured = mismatch_of(position, low, high), True
    spent = contraction.function.calls - start
    share = abs(here / mismatch) if mismatch else 0.0
    if not measured or not abs(here) > tolerance:
        words = "the error is spread over many elements, no single element stands out"
        if high - low > 1 and left() < 4:
            words = f"the error is in flat elements {low} to {high - 1} (pass more localise_evaluations to find it)"
        return Location(position, None, None, share, spent, words)
    index = unravelled(low, directions[position].shape)
    wrong_by = here / float(directions[position].reshape(-1)[low]) / contraction.scale
    alone = (
        "which explains the whole mismatch"
        if 0.9 <= share <= 1.1
        else f"which is {share:.1%} of the mismatch, so other elements are wrong too"
    )
    words = f"{contraction.function.leaves[position].index_in_words(index)} is off by {wrong_by:.4g}, {alone}"
    return Location(position, index, wrong_by, share, spent, words)
