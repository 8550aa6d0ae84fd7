"""Liger-Kernel's Triton kernels with the signatures of the ready ops. They are imported at their first use by name.

They need ``pip install 'ktonum[peers]'``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ktonum.errors import UsageError
from ktonum.ready_ops.interpreted_kernels import make_interpretable

# The modules of ``liger_kernel.ops`` with the kernels that these ops launch.
_KERNELS = ("rms_norm", "layer_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy", "utils")


def _functional() -> Any:
    """Liger-Kernel's functions, after its kernels are made to run in the interpreter.

    Raises:
        UsageError: Liger-Kernel cannot be imported.
    """
    try:
        modules: list[ModuleType] = [importlib.import_module(f"liger_kernel.ops.{kernel}") for kernel in _KERNELS]
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        raise UsageError(f"liger-kernel cannot be imported ({error}): pip install 'ktonum[peers]'") from error
    for module in modules:
        make_interpretable(module)
    return functional


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Any:
    """`liger_rms_norm` with its defaults: the Llama casting mode, and backward overwrites the upstream gradient."""
    if x.dtype == torch.float64:
        raise UsageError("liger_rms_norm does not accept float64: audit it in bf16, fp16 or fp32")
    return _functional().liger_rms_norm(x, weight, eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
    return _functional().liger_layer_norm(x, weight, bias, eps)


def _swiglu(gate: Tensor, up: Tensor) -> Any:
    return _functional().liger_swiglu(gate, up)


def _cross_entropy(logits: Tensor, target: Tensor, **parameters: Any) -> Any:
    return _functional().liger_cross_entropy(logits, target, **parameters)


def _fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **parameters: Any
) -> Any:
    return _functional().liger_fused_linear_cross_entropy(input, weight, target, bias=bias, **parameters)


_CANDIDATES: dict[str, Callable[..., Any]] = {
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _fused_linear_cross_entropy,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
}


def __getattr__(name: str) -> Callable[..., Any]:
    """A candidate by its op's name. It imports Liger-Kernel now, so that a missing package is not an error per case."""
    if name not in _CANDIDATES:
        raise AttributeError(f"module {__name__!r} has no candidate {name!r}: it has {', '.join(_CANDIDATES)}")
    _functional()
    return _CANDIDATES[name]
