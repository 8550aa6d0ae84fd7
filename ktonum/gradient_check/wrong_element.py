"""Find the wrong element after a gradient check has failed.

The mismatch ``<g, d> - D`` is linear in the direction, so halving the set of elements that move and measuring one
half tells about both. One central difference a halving is enough: a defect that was detected stands far above the
error of a plain difference at the sharpest step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ktonum.gradient_check.checked_function import Contraction
from ktonum.gradient_check.result import Location
from ktonum.measure.comparison import unravelled

__all__ = ["localise"]


def localise(
    contraction: Contraction,
    directions: Mapping[int, torch.Tensor],
    gradients: Mapping[int, torch.Tensor],
    *,
    mismatch: float,
    step: float,
    tolerance: float,
    budget: int,
) -> Location:
    """The input, and where possible the element, that carries a mismatch.

    Args:
        contraction: The checked function; its outputs contracted to one number.
        directions: Directions of the failed probe by input position, float64.
        gradients: Analytic gradients for the same positions, float64.
        mismatch: The signed mismatch of the failed probe, analytic minus finite difference.
        step: Step for single central differences.
        tolerance: Error of such a difference; a part below it is not trusted.
        budget: Most forward evaluations to spend here, at least two for each input of the probe.

    Returns:
        The location; its index is None when the defect is spread or the budget ran out.
    """
    start = contraction.function.calls

    def left() -> int:
        return budget - (contraction.function.calls - start)

    def mismatch_of(position: int, low: int, high: int) -> float:
        part = torch.zeros_like(directions[position])
        part.view(-1)[low:high] = directions[position].reshape(-1)[low:high]
        analytic = float((gradients[position] * part).sum())
        return analytic - contraction.half_difference({position: part}, step)[0] / step

    parts = {p: mismatch for p in directions}
    if len(directions) > 1 and left() >= 2 * len(directions):
        parts = {p: mismatch_of(p, 0, d.numel()) for p, d in directions.items()}
    position = max(parts, key=lambda p: abs(parts[p]) if math.isfinite(parts[p]) else math.inf)
    low, high, here = 0, directions[position].numel(), parts[position]
    measured = False
    # The last pair is kept for measuring the single element itself, which may only be known as a remainder.
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
        words = f"in input {position}, spread over many elements: no single one stands out"
        if high - low > 1 and left() < 4:
            words = f"in input {position}, flat elements {low} to {high - 1} (localise_evaluations spent)"
        return Location(position, None, None, share, spent, words)
    index = unravelled(low, directions[position].shape)
    wrong_by = here / float(directions[position].reshape(-1)[low])
    alone = "which explains the whole mismatch" if 0.9 <= share <= 1.1 else f"{share:.1%} of the mismatch, others too"
    words = f"in input {position}, element {list(index)} wrong by {wrong_by:.4g}, {alone}"
    return Location(position, index, wrong_by, share, spent, words)
