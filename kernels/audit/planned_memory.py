"""How much device memory a forward and backward take beside their inputs, added up from what the kernels plan.

The sum lists the large tensors. For the many small ones it adds a number of bytes for each token and each step. The
peaks that `ktonum bench` measured on an H100 are within 5 MiB of the large tensors' sum at every size
(`tests/kto_kernels/audit/test_planned_memory.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktonum.kernels.device.block_sizes import block_sizes
from ktonum.kernels.device.gradients.launch import WIDE_ROWS
from ktonum.kernels.device.logits.launch import LOGITS_AT_A_TIME
from ktonum.kernels.device.products import accumulator_dtype
from ktonum.kernels.device.slabs import DEFAULT_WORKSPACE, row_stride

__all__ = ["Step", "peak_memory"]

# Statistics are 32 bytes; places, sorted targets and coefficients are 28 to 36; sorting takes as much again.
_BYTES_A_TOKEN = 128
# Scalars, sums over sequences, and what the allocator rounds up.
_SMALL = 4 * 2**20
# Stretches of the column sums of two heads, the policy's and the reference's.
_COLUMN_SUMS = 2 * 64


@dataclass(frozen=True)
class Step:
    """A forward and backward with all three gradients.

    Attributes:
        tokens: B·T, masked ones included.
        hidden: H.
        vocabulary: V.
        dtype: Of the inputs.
        packed: Whether tokens are masked, so that the hidden states of the others are copied.
        descriptors: Whether tiles of 16-bit operands are loaded through descriptors. They are on Hopper if rows are
            multiples of 16 bytes.
        workspace: As given to the loss.
    """

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    packed: bool = True
    descriptors: bool = False
    workspace: int = DEFAULT_WORKSPACE


def peak_memory(step: Step) -> int:
    """The most bytes in use at once, gradients included, inputs not."""
    N, H, V = step.tokens, step.hidden, step.vocabulary
    size, wide = step.dtype.itemsize, accumulator_dtype(step.dtype).itemsize
    everything = N * row_stride(V) * size
    # Slabs that are computed again lie in the same workspace.
    exponentials = min(everything, step.workspace)
    gradients = V * H * size + V * (size + wide)
    tiles = -(-V // block_sizes(step.dtype, descriptors=step.descriptors).columns)
    forward = 2 * tiles * N * wide
    if size > 2 and exponentials < everything:
        forward += LOGITS_AT_A_TIME
    # The weighted hidden states, or in their place the input's gradient; and the sums for that gradient.
    backward = N * H * (size + wide)
    if not step.descriptors:
        # A product's result beside the one before it.
        backward += 2 * min(V, WIDE_ROWS) * H * wide
    small = _SMALL + _BYTES_A_TOKEN * N + _COLUMN_SUMS * H * (8 + wide)
    return exponentials + gradients + N * H * size * step.packed + max(forward, backward) + small
