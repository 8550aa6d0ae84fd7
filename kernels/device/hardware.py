"""What the device and the installed Triton can do, and how tensors are therefore stored and loaded."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.device.logits.kernels import logits_kernel

__all__ = [
    "ACCUMULATORS",
    "INTERPRETED",
    "capability",
    "check_support",
    "programs",
    "serves_descriptors",
    "slab_dtype",
    "slab_scale",
]

#: Whether Triton's interpreter runs the kernels. TRITON_INTERPRET decides it when they are first imported.
INTERPRETED = not isinstance(logits_kernel, triton.JITFunction)

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


def check_support(device: torch.device, dtype: torch.dtype, *, triton_version: str = triton.__version__) -> None:
    """Check that kernels can run: on CUDA, or anywhere under the interpreter; in float64 from Triton 3.5 on.

    Args:
        device: Where the tensors are.
        dtype: Theirs.
        triton_version: Of the Triton that compiles the kernels.

    Raises:
        InputError: The tensors are on another device, or of a dtype that this Triton cannot multiply.
    """
    if device.type != "cuda" and not INTERPRETED:
        raise InputError(
            f"the tensors are on {device}, where Triton cannot compile kernels: move them to a CUDA device, or set the "
            f"environment variable TRITON_INTERPRET=1 before ktonum.kernels is imported to run Triton's interpreter"
        )
    if dtype == torch.float64 and tuple(map(int, triton_version.split(".")[:2])) < (3, 5):
        raise InputError(
            f"the tensors are float64, which tl.dot multiplies from Triton 3.5 on, and this is {triton_version}: "
            f"upgrade Triton, or use another dtype"
        )


def slab_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which exponentials are stored: that of the operands; float32 for bfloat16 under the interpreter.

    The interpreter truncates where it should round to bfloat16. So the caller gets a float32 slab, and rounds it.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def slab_scale(dtype: torch.dtype) -> float:
    """The factor of all numbers in a slab. In float16 a probability below 6e-5 would be subnormal, below 6e-8 zero."""
    return 2.0**14 if dtype == torch.float16 else 1.0


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def programs(device: torch.device, tiles: int, *, persistent: bool) -> int:
    """How many programs share the tiles: one for each tile; if ``persistent``, at most one for each multiprocessor."""
    if persistent and device.type == "cuda":
        return min(tiles, _multiprocessors(device))
    return tiles


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def serves_descriptors(*tensors: Tensor) -> bool:
    """Whether a copy engine can load tiles of these matrices: on Hopper, 16 bits, rows multiples of 16 bytes apart.

    Later devices have copy engines too, but nothing was measured on them, and some have too little shared memory. The
    interpreter uses descriptors on any device, so that tests reach both ways of loading.
    """

    def fits(tensor: Tensor) -> bool:
        return (
            tensor.stride(1) == 1
            and tensor.stride(0) * tensor.itemsize % 16 == 0
            and tensor.stride(0) > 0
            and tensor.data_ptr() % 16 == 0
        )

    sixteen_bit = tensors[0].dtype in (torch.bfloat16, torch.float16)
    able = INTERPRETED or capability(tensors[0].device)[0] == 9
    return sixteen_bit and able and all(fits(t) for t in tensors)
