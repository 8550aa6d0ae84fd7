"""Random numbers for directions and cotangents, which a key alone determines."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["seeded_signs"]

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def seeded_signs(shape: torch.Size, device: torch.device, *key: int) -> Tensor:
    """Random signs times magnitudes drawn uniformly from [0.5, 1.5), in float64; ``key`` alone determines them.

    Signed, so rows that sum to zero are seen; bounded away from 0, so no element is overlooked; of unequal
    magnitudes, so that two wrong elements of equal size never cancel, which they do half of the time under the plain
    signs of Rademacher.
    """
    state = 0
    for number in key:  # splitmix64 (Steele, Lea and Flood 2014), a round for each part of the key
        state = (state + number + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    generator = torch.Generator().manual_seed(state >> 1)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64).mul_(2.0).sub_(1.0)
    return draw.add_(draw.sign(), alpha=0.5).to(device)
