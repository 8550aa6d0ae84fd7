"""What the device and this Triton can do, and what follows for how tensors are stored and loaded."""

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

#: Whether Triton's interpreter runs the kernels: decided by TRITON_INTERPRET when they are first imported.
INTERPRETED = not isinstance(logits_kernel, triton.JITFunction)

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


def check_support(device: torch.device, dtype: torch.dtype) -> None:
    """Kernels run on CUDA, or anywhere under the interpreter; in float64 from Triton 3.5 on.

    Raises:
        InputError: The tensors are elsewhere, or of a dtype that this Triton cannot multiply.
    """
    if device.type != "cuda" and not INTERPRETED:
        raise InputError(
            f"the tensors are on {device}, where Triton cannot compile kernels: move them to a CUDA device, or set the "
            f"environment variable TRITON_INTERPRET=1 before ktonum.kernels is imported to run Triton's interpreter"
        )
    if dtype == torch.float64 and _TRITON < (3, 5):
        raise InputError(
            f"the tensors are float64, which tl.dot multiplies from Triton 3.5 on, and this is {triton.__version__}: "
            f"upgrade Triton, or use another dtype"
        )


def slab_dtype(dtype: torch.dtype) -> torch.dtype:
    """What exponentials are stored in: the operands' dtype, float32 for bfloat16 under the interpreter.

    The interpreter truncates on a cast to bfloat16; the caller rounds its float32 slab to nearest instead.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def slab_scale(dtype: torch.dtype) -> float:
    """The factor that slabs carry: in float16 a probability below 6e-5 is subnormal, below 6e-8 zero."""
    return 2.0**14 if dtype == torch.float16 else 1.0


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def programs(device: torch.device, tiles: int, *, persistent: bool) -> int:
    """How many programs share the tiles: one a multiprocessor where a program takes tile after tile."""
    if persistent and device.type == "cuda":
        return min(tiles, _multiprocessors(device))
    return tiles


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def serves_descriptors(*tensors: Tensor) -> bool:
    """Whether a copy engine can load tiles of these 16-bit matrices: on Hopper, rows multiples of 16 bytes apart.

    Later devices have copy engines too, but nothing was measured there, and some have too little shared memory. The
    interpreter takes them anywhere, so that tests reach both ways.
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
