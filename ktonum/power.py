"""Power: the smallest planted defect that a probe flags, found by planting it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ktonum.probe import Probe
from ktonum.results import Power

__all__ = ["power_of"]

# Sizes tried, smallest and largest: from below float64's roundoff to a defect nobody could overlook.
_SMALLEST, _LARGEST = 1e-17, 4.0
# The search stops when the size is known to this factor.
_RESOLUTION = 1.5


def power_of(probe: Probe, standard: str) -> tuple[Power, ...]:
    """The smallest flagged defect of each kind.

    A defect is planted in the tensor that the candidate made, and the very measurements of the check are taken again.
    """
    tensor = probe.actual
    if not tensor.is_floating_point():
        return (Power(f"one element of {probe.name} off by one", _smallest(probe, standard, _off_by_one, (1.0,))),)
    powers = []
    finite = tensor.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    nonzero, root = bool(finite.any()), float(finite.square().mean().sqrt()) or 1.0
    del finite  # float64, of a gradient that may fill much of a GPU
    if nonzero:
        defect = f"{probe.name} scaled by 1 + size"
        powers.append(Power(defect, _search(probe, standard, lambda t, size: t.double() * (1 + size))))
    if tensor.numel() > 1 or not powers:
        unit = "its root mean square" if nonzero else "one"
        defect = f"one element of {probe.name} off by size × {unit}"
        powers.append(Power(defect, _search(probe, standard, lambda t, size: _one_element(t, size * root))))
    return tuple(powers)


def _flagged(probe: Probe, standard: str, planted: Tensor) -> bool:
    if planted.is_floating_point():
        # A defect that rounding to the tensor's dtype undoes is no defect.
        planted = planted.to(probe.actual.dtype)
    return any(not m.within for m in probe.measure(planted, standard))


def _search(probe: Probe, standard: str, plant: Callable[[Tensor, float], Tensor]) -> float | None:
    """The smallest flagged size to a factor of `_RESOLUTION`, by bisection of its logarithm; None if there is none."""
    if not _flagged(probe, standard, plant(probe.actual, _LARGEST)):
        return None
    low, high = _SMALLEST, _LARGEST
    while high / low > _RESOLUTION:
        middle = math.sqrt(low * high)
        if _flagged(probe, standard, plant(probe.actual, middle)):
            high = middle
        else:
            low = middle
    return high


def _smallest(
    probe: Probe, standard: str, plant: Callable[[Tensor, float], Tensor], sizes: tuple[float, ...]
) -> float | None:
    return next((s for s in sizes if _flagged(probe, standard, plant(probe.actual, s))), None)


def _one_element(tensor: Tensor, size: float) -> Tensor:
    """The middle element, which is no corner case of any tile, or the first finite one, moved by ``size``."""
    planted = tensor.double().clone(memory_format=torch.contiguous_format)
    flat = planted.view(-1)
    place = tensor.numel() // 2
    if not bool(flat[place].isfinite()):
        place = int(flat.isfinite().byte().argmax())
    flat[place] += size
    return planted


def _off_by_one(tensor: Tensor, size: float) -> Tensor:
    planted = tensor.clone(memory_format=torch.contiguous_format)
    flat = planted.view(-1)
    middle = tensor.numel() // 2
    flat[middle] = ~flat[middle] if tensor.dtype == torch.bool else flat[middle] + int(size)
    return planted
