"""Oracles whose rows differ in size, and changes of them: rounding, truncation, a single wrong element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Arguments of `ktonum.assert_within` whose tolerance comes from a table, and others whose tolerance is derived.
KTO: dict[str, Any] = {"op": "kto", "output": "grad_weight", "device": "interpreter"}
SUM: dict[str, Any] = {"op": "somebody_elses", "output": "y", "terms": 64}


def gradient(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A float64 oracle whose rows differ in size by a factor of about ten."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(*shape[:-1], 1, generator=draw, dtype=torch.float64) + 0.1
    return scale * rows * torch.randn(shape, generator=draw, dtype=torch.float64)


def truncated(exact: Tensor) -> Tensor:
    """To bf16 towards zero: the low 16 bits of a float32 dropped."""
    return (exact.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def put(exact: Tensor, index: tuple[int, ...] | int, value: float, dtype: torch.dtype) -> Tensor:
    changed = exact.to(dtype, copy=True)
    changed[index] = value
    return changed
