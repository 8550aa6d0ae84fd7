"""Tile shapes of the kernels, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["BlockSizes", "Kernel", "block_sizes"]

Kernel = Literal["statistics", "probabilities"]


@dataclass(frozen=True)
class BlockSizes:
    """Tile shape and launch options of a logits kernel.

    Attributes:
        rows: Tokens a tile.
        columns: Vocabulary entries a tile.
        hidden: Hidden entries a step of the product.
        promote: Steps after which a partial product is added up outside the tensor cores; 0 for never.
        group: Row tiles that share a stretch of the weight in L2.
        warps: Warps a program.
        stages: Software-pipelining depth.
    """

    rows: int
    columns: int
    hidden: int
    promote: int = 0
    group: int = 16
    warps: int = 8
    stages: int = 3


# On an H100 (bf16, 8192 × 4096 × 151,936) the statistics ran at 555 to 583 TFLOP/s with 128 × 128 tiles and 584 to 668
# with 128 × 256. The smaller tile leaves registers for a second accumulator: with promotion every 512 hidden entries
# the larger one spills (sm_90, 240 bytes of stack), and the log-sum-exp needs it.
_SIXTEEN_BIT = {
    "statistics": BlockSizes(128, 128, 64, promote=8, stages=4),
    "probabilities": BlockSizes(128, 256, 64),
}
# Below sm_90 a block has at most 163 KiB of shared memory (sm_80) or 99 KiB (sm_86, sm_89).
_SIXTEEN_BIT_BEFORE_HOPPER = BlockSizes(128, 128, 32, promote=16)
_FLOAT32 = BlockSizes(64, 128, 32)
_FLOAT64 = BlockSizes(32, 64, 32, warps=4, stages=2)
# The interpreter runs a program's statements one by one in NumPy: few large tiles keep its overhead down, and tiles
# this small still give audits on a CPU several of them.
_INTERPRETER = BlockSizes(128, 256, 64, promote=2)


def block_sizes(
    dtype: torch.dtype, kernel: Kernel, *, capability: tuple[int, int] = (9, 0), interpreted: bool = False
) -> BlockSizes:
    """The tile shape of ``kernel`` for operands of ``dtype`` on a GPU of that compute capability."""
    if interpreted:
        return _INTERPRETER
    if dtype == torch.float64:
        return _FLOAT64
    if dtype == torch.float32:
        return _FLOAT32
    return _SIXTEEN_BIT[kernel] if capability >= (9, 0) else _SIXTEEN_BIT_BEFORE_HOPPER
