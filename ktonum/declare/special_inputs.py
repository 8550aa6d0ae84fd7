"""Inputs at the ends of their range, made of ordinary ones: large, zero, or what an op's author declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["SpecialInputs", "default_special_inputs"]

#: Inputs and parameters to other inputs, or None where the op has no such thing under these parameters.
SpecialInputs = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any] | None]

# Normal values go to ±10,000 with it: far into the saturation of every exponential, and inside float16's range.
_LARGE = 2.0**11
# Outliers go no further than this: what overflows float16 is an infinity, which the check `nonfinite` asks about.
_LARGEST = 2.0**14


def default_special_inputs(names: Sequence[str]) -> dict[str, SpecialInputs]:
    """Each of the named inputs large, and each zero, while the others stay as they are."""
    special: dict[str, SpecialInputs] = {}
    for name in names:
        special[f"{name} × {_LARGE:g}"] = _times(name, _LARGE)
        special[f"{name} zero"] = _times(name, 0.0)
    return special


def _times(name: str, factor: float) -> SpecialInputs:
    def change(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        # Zeros of one sign: minus zero is another test.
        changed = torch.zeros_like(inputs[name])
        if factor:
            changed = (inputs[name].double() * factor).clamp(-_LARGEST, _LARGEST).to(changed.dtype)
        return {**inputs, name: changed}

    return change
