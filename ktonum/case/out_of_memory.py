"""Telling an exhausted device from a wrong kernel."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]

# Of the driver itself: PyTorch's own calls raise AcceleratorError with the first, Triton's launcher RuntimeError with
# the second, where another process took what was left.
_DRIVER_MESSAGES = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that the device has no memory left, through PyTorch's allocator or past it."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(_DRIVER_MESSAGES)
