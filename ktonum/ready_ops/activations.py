"""Hidden states like those of language models."""

from __future__ import annotations

import torch
from torch import Tensor

from ktonum.declare.drawing import Draw
from ktonum.errors import UsageError

__all__ = ["activations"]

# One of this many channels is large, as in trained transformers.
_OUTLIER_EVERY = 37
_OUTLIER_SCALE = 30.0
_SHIFT = 3.0


def activations(draw: Draw) -> Tensor:
    """Rows of hidden states, (N, H) with the case's dims, in the dtype under audit.

    There are three distributions: ``normal``; ``outliers``, with a few channels 30 times as large; and ``shifted``,
    with a mean of three standard deviations, so that mean(x²) − mean(x)² cancels.

    Raises:
        UsageError: The distribution is another one.
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
