"""Tile shapes of the kernels, in one table, and how many tiles cover a size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

__all__ = ["BlockSizes", "WEIGHT_GRADIENT", "block_sizes", "cdiv"]


def cdiv(dividend: int, divisor: int) -> int:
    """⌈dividend / divisor⌉; `triton.cdiv` took an H100's host 8 µs under the profiler, 28 times a step."""
    return -(-dividend // divisor)


@dataclass(frozen=True)
class BlockSizes:
    """Tile shape and launch options of a kernel around a matrix product.

    Attributes:
        rows: Tokens in a tile, or in one step of a product over tokens.
        columns: Vocabulary entries in a tile.
        hidden: Hidden entries in a tile, or in one step of a product over them.
        descriptors: Whether tiles are loaded through tensor descriptors, by programs that take tile after tile.
        promote: Steps after which a partial product is added up outside the tensor cores; 0 for never.
        group: Row tiles that share a stretch of the weight in L2.
        warps: Warps of a program.
        stages: Software-pipelining depth.
    """

    rows: int
    columns: int
    hidden: int
    descriptors: bool = False
    promote: int = 0
    group: int = 16
    warps: int = 8
    stages: int = 3


# Times over that of cuBLAS' bare product, in turns on an H100 (bf16, 8192 × 4096 × 151,936), ± 0.01. If nothing is
# stored: 1.087, 1.097 and 1.065 with groups of 16, 22 and 32 row tiles. If exponentials are stored: 1.074, 1.077, 1.071
# and 1.079 with groups of 8, 16, 22 and 32. A fourth stage adds 0.02 to 0.03 to each. Tiles of 128 × 128 through
# pointers ran at 555 to 583 TFLOP/s, where cuBLAS ran at 790. The large tile leaves no registers for promoting partial
# products: with it the compiler spilled 240 bytes.
_DESCRIPTORS = BlockSizes(128, 256, 64, descriptors=True, group=32)
_DESCRIPTORS_STORED = BlockSizes(128, 256, 64, descriptors=True, group=22)
# For unaligned operands on Hopper, and for all operands on later devices, because some of these have only 99 KiB of
# shared memory for a block. The small tile leaves registers for a second accumulator.
_SIXTEEN_BIT = BlockSizes(128, 128, 64, promote=8, stages=4)
# Before sm_90 a block has at most 163 KiB of shared memory (sm_80) or 99 KiB (sm_86, sm_89).
_SIXTEEN_BIT_BEFORE_HOPPER = BlockSizes(128, 128, 32, promote=16)
# For 32 and 64 bits. The library computes the products; a program only turns tiles of them into exponentials.
_SOFTMAX = BlockSizes(16, 256, 0, warps=4, stages=1)
# The interpreter runs a program's statements one by one in NumPy: few large tiles keep its overhead down, and tiles
# this small still give audits on a CPU several of them.
_INTERPRETER = BlockSizes(128, 256, 64, promote=2)
_INTERPRETER_DESCRIPTORS = BlockSizes(128, 256, 64, descriptors=True)
_INTERPRETER_SOFTMAX = BlockSizes(128, 256, 0)

#: For the weight's gradient; a tile is of columns × hidden entries. On the same H100, in turns, the kernel took 1.043
#: times as long as cuBLAS' product, which lacks the targets' terms, and 1.052 times with three stages and groups of 16.
#: cuBLAS' product with a float32 result, to which these terms could be added, took 16.5 ms where the kernel took 14.0
#: to 15.4.
WEIGHT_GRADIENT = BlockSizes(64, 128, 256, descriptors=True, group=8, stages=4)


@functools.cache
def block_sizes(
    dtype: torch.dtype,
    *,
    capability: tuple[int, int] = (9, 0),
    interpreted: bool = False,
    descriptors: bool = False,
    stored: bool = False,
) -> BlockSizes:
    """The tile shape of the logits kernel for operands of ``dtype`` on a GPU of that compute capability.

    ``descriptors`` says whether the operands are laid out for them, see
    `ktonum.kernels.device.hardware.serves_descriptors`; ``stored`` whether exponentials are stored.
    """
    if dtype.itemsize > 2:
        return _INTERPRETER_SOFTMAX if interpreted else _SOFTMAX
    if interpreted:
        return _INTERPRETER_DESCRIPTORS if descriptors else _INTERPRETER
    if descriptors:
        return _DESCRIPTORS_STORED if stored else _DESCRIPTORS
    return _SIXTEEN_BIT if capability >= (9, 0) else _SIXTEEN_BIT_BEFORE_HOPPER
