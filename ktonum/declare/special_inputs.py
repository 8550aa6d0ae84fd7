"""Inputs at the ends of their range, made from ordinary ones: large, zero, or as an op's author declares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["SpecialInputs", "default_special_inputs"]

#: Takes inputs and parameters by name and returns other inputs, or None if they do not exist for these parameters.
SpecialInputs = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any] | None]

# Times this, normal values reach about ±10,000: every exponential saturates, but float16 does not overflow.
_LARGE = 2.0**11
# Values are clipped to this so that they do not become infinite in float16. The check `nonfinite` covers infinities.
_LARGEST = 2.0**14


def default_special_inputs(names: Sequence[str]) -> dict[str, SpecialInputs]:
    """For each of the named inputs: this input large, and this input zero, while the others are unchanged."""
    special: dict[str, SpecialInputs] = {}
    for name in names:
        special[f"{name} × {_LARGE:g}"] = _times(name, _LARGE)
        special[f"{name} zero"] = _times(name, 0.0)
    return special


def _times(name: str, factor: float) -> SpecialInputs:
    def change(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        # All zeros are positive. Multiplying by 0.0 would give zeros of both signs.
        changed = torch.zeros_like(inputs[name])
        if factor:
            changed = (inputs[name].double() * factor).clamp(-_LARGEST, _LARGEST).to(changed.dtype)
        return {**inputs, name: changed}

    return change
