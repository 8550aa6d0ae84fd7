"""Tile shapes of the kernels, in one table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BlockSizes", "WEIGHT_GRADIENT", "block_sizes"]


@dataclass(frozen=True)
class BlockSizes:
    """Tile shape and launch options of a kernel around a matrix product.

    Attributes:
        rows: Tokens a tile, or tokens a step of a product over tokens.
        columns: Vocabulary entries a tile.
        hidden: Hidden entries a tile, or a step of a product over them.
        descriptors: Whether tiles are loaded through tensor descriptors, by programs that take tile after tile.
        promote: Steps after which a partial product is added up outside the tensor cores; 0 for never.
        group: Row tiles that share a stretch of the weight in L2.
        warps: Warps a program.
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


# On an H100 (bf16, 8192 × 4096 × 151,936) logits with softmax statistics ran at 690 to 770 TFLOP/s with 128 × 256 tiles
# through descriptors, beside 720 to 795 for cuBLAS' bare product; at 650 with 256 × 128; at 555 to 583 with 128 × 128
# through pointers. The large tile leaves no registers to promote partial products (240 bytes of stack). Timed in turn
# with cuBLAS, over its time: 0.96 with 4 stages where nothing is stored, 0.99 with 3 where shared memory must also hold
# half a tile on its way out; groups of 8, 16 and 32 were alike within 2 %.
_DESCRIPTORS = BlockSizes(128, 256, 64, descriptors=True, stages=4)
_DESCRIPTORS_STORED = BlockSizes(128, 256, 64, descriptors=True)
# Unaligned operands on Hopper, and all on later devices, of which some have 99 KiB of shared memory a block. The small
# tile leaves registers for a second accumulator.
_SIXTEEN_BIT = BlockSizes(128, 128, 64, promote=8, stages=4)
# Below sm_90 a block has at most 163 KiB of shared memory (sm_80) or 99 KiB (sm_86, sm_89).
_SIXTEEN_BIT_BEFORE_HOPPER = BlockSizes(128, 128, 32, promote=16)
_FLOAT32 = BlockSizes(64, 128, 32)
_FLOAT64 = BlockSizes(32, 64, 32, warps=4, stages=2)
# The interpreter runs a program's statements one by one in NumPy: few large tiles keep its overhead down, and tiles
# this small still give audits on a CPU several of them.
_INTERPRETER = BlockSizes(128, 256, 64, promote=2)
_INTERPRETER_DESCRIPTORS = BlockSizes(128, 256, 64, descriptors=True)

#: Columns × hidden entries a tile. There: 740 to 780 TFLOP/s with the targets' terms, beside cuBLAS' 660 to 730
#: without, which would take 3 ms more to add them before it rounds.
WEIGHT_GRADIENT = BlockSizes(64, 128, 256, descriptors=True)


def block_sizes(
    dtype: torch.dtype,
    *,
    capability: tuple[int, int] = (9, 0),
    interpreted: bool = False,
    descriptors: bool = False,
    stored: bool = False,
) -> BlockSizes:
    """The tile shape of the logits kernel for operands of ``dtype`` on a GPU of that compute capability.

    ``descriptors`` says whether the operands are laid out for them, see `ktonum.kernels.hardware.serves_descriptors`;
    ``stored`` whether exponentials are stored.
    """
    if interpreted:
        return _INTERPRETER_DESCRIPTORS if descriptors else _INTERPRETER
    if dtype == torch.float64:
        return _FLOAT64
    if dtype == torch.float32:
        return _FLOAT32
    if descriptors:
        return _DESCRIPTORS_STORED if stored else _DESCRIPTORS
    return _SIXTEEN_BIT if capability >= (9, 0) else _SIXTEEN_BIT_BEFORE_HOPPER
