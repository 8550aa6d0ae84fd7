"""Hidden states as language models have them."""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.declare.drawing import Draw
from ktonum.errors import UsageError

__all__ = ["activations"]

# One channel in so many is large, as in trained transformers.
_OUTLIER_EVERY = 37
_OUTLIER_SCALE = 30.0
_SHIFT = 3.0


def activations(draw: Draw) -> Tensor:
    """Rows of hidden states, (N, H) of the case's dims, of the dtype under audit.

    Distributions: ``normal``; ``outliers``, with a few channels 30 times as large; ``shifted``, with a mean of three
    standard deviations, which the variance must not cancel against.

    Raises:
        UsageError: Another distribution.
    """
    rows, hidden = draw.dims["N"], draw.dims["H"]
    x = draw.normal(rows, hidden).float()
    if draw.distribution == "outliers":
        large = torch.arange(hidden, device=draw.device) % _OUTLIER_EVERY == 0
        x = torch.where(large, _OUTLIER_SCALE * x, x)
    elif draw.distribution == "shifted":
        x = x + _SHIFT
    elif draw.distribution != "normal":
        raise UsageError(f"unknown distribution {draw.distribution!r}: use normal, outliers or shifted")
    return x.to(draw.dtype)
