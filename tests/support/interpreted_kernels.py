"""Triton kernels for the interpreter: one that calculates in the dtype it loads, one that upcasts, one autotuned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.libdevice import tanh


@triton.jit
def _doubled(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, value + value)


@triton.jit
def _doubled_wide(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i).to(tl.float32)
    tl.store(out + i, value + value)


@triton.jit
def _doubled_rounded_inside(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i).to(tl.float32)
    tl.store(out + i, (value * 1.01).to(out.dtype.element_ty))


@triton.jit
def _summed(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


@triton.jit
def _scaled(x, out, factor, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tanh(tl.load(x + i)) * factor.to(tl.float32))


@triton.autotune(configs=[triton.Config({"STEP": 1}), triton.Config({"STEP": 2})], key=[])
@triton.jit
def _stepped(x, out, N: tl.constexpr, STEP: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + STEP)


def doubled(x: Tensor) -> Tensor:
    """2 x, calculated in the dtype of ``x``."""
    out = torch.empty_like(x)
    _doubled[(1,)](x, out, N=x.numel())
    return out


def doubled_wide(x: Tensor) -> Tensor:
    """2 x in float32, rounded outside the kernel."""
    out = torch.empty_like(x, dtype=torch.float32)
    _doubled_wide[(1,)](x, out, N=x.numel())
    return out.to(x.dtype)


def rounded_inside(x: Tensor) -> Tensor:
    """1.01 x in float32, rounded by the kernel."""
    out = torch.empty_like(x)
    _doubled_rounded_inside[(1,)](x, out, N=x.numel())
    return out


def summed(x: Tensor) -> Tensor:
    """Σ x, in the dtype of ``x``."""
    out = x.new_empty(())
    _summed[(1,)](x, out, N=x.numel())
    return out


def scaled(x: Tensor, factor: float) -> Tensor:
    """tanh(x) · factor."""
    out = torch.empty_like(x)
    _scaled[(1,)](x, out, factor, N=x.numel())
    return out


def stepped(x: Tensor) -> Tensor:
    """x + 1, by the first configuration."""
    out = torch.empty_like(x)
    _stepped[(1,)](x, out, N=x.numel())
    return out
