"""Liger-Kernel's Triton kernels under the ops' own signatures. Imported on use: ``pip install 'ktonum[peers]'``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ktonum.errors import UsageError
from ktonum.ops.interpreted_kernels import make_interpretable

__all__ = ["cross_entropy", "fused_linear_cross_entropy", "layer_norm", "rms_norm", "swiglu"]

# Where the kernels live that these ops launch.
_KERNELS = ("rms_norm", "layer_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy", "utils")


def _liger(name: str) -> Callable[..., Any]:
    try:
        modules = [importlib.import_module(f"liger_kernel.ops.{kernel}") for kernel in _KERNELS]
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        raise UsageError(f"liger-kernel cannot be imported ({error}): pip install 'ktonum[peers]'") from error
    for module in modules:
        make_interpretable(module)
    function: Callable[..., Any] = getattr(functional, f"liger_{name}")
    return function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`liger_rms_norm` with its defaults: the Llama casting mode, the gradient written over the upstream gradient.

    Raises:
        UsageError: The dtype is float64, which its backward does not know.
    """
    if x.dtype == torch.float64:
        raise UsageError("liger_rms_norm takes no float64")
    result: Tensor = _liger("rms_norm")(x, weight, eps)
    return result


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`liger_layer_norm`."""
    result: Tensor = _liger("layer_norm")(x, weight, bias, eps)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`liger_swiglu`."""
    result: Tensor = _liger("swiglu")(gate, up)
    return result


def cross_entropy(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    """`liger_cross_entropy`; it writes the gradient over the logits."""
    result: Tensor = _liger("cross_entropy")(logits, target, **parameters)
    return result


def fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **parameters: Any
) -> Tensor:
    """`liger_fused_linear_cross_entropy`."""
    result: Tensor = _liger("fused_linear_cross_entropy")(input, weight, target, bias=bias, **parameters)
    return result
