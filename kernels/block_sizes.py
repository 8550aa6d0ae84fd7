"""Tile shapes of the kernels, in one table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BlockSizes", "block_sizes"]


@dataclass(frozen=True)
class BlockSizes:
    """Tile shape and launch options of a logits kernel.

    Attributes:
        rows: Tokens a tile.
        columns: Vocabulary entries a tile.
        hidden: Hidden entries a step of the product.
        group: Row tiles that share a stretch of the weight in L2.
        warps: Warps a program.
        stages: Software-pipelining depth.
    """

    rows: int
    columns: int
    hidden: int
    group: int = 8
    warps: int = 4
    stages: int = 3


# 16-bit operands: the largest tile whose float32 accumulator two warp groups of a Hopper GPU hold in registers.
_SIXTEEN_BIT = BlockSizes(128, 256, 64, warps=8, stages=3)
_FLOAT32 = BlockSizes(64, 128, 32, warps=8, stages=3)
_FLOAT64 = BlockSizes(32, 64, 32, warps=4, stages=2)
# The interpreter runs a program's statements one by one in NumPy: few large tiles keep its overhead down, and tiles
# this small still give audits on a CPU several of them.
_INTERPRETER = BlockSizes(128, 256, 256)


def block_sizes(dtype: torch.dtype, *, interpreted: bool = False) -> BlockSizes:
    """The tile shape for operands of ``dtype``."""
    if interpreted:
        return _INTERPRETER
    if dtype == torch.float64:
        return _FLOAT64
    return _FLOAT32 if dtype == torch.float32 else _SIXTEEN_BIT
