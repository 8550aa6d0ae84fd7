"""The backward's two matrix products. They accumulate in float32 or better, whatever the process's switches say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["accumulator_dtype", "add_product", "full_precision_products", "product"]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision_products(device: torch.device, *, allow_tf32: bool) -> Iterator[None]:
    """Within it, cuBLAS uses TF32 only if ``allow_tf32``, adds split-K partial sums in float32, and autocast is off.

    TF32 and the dtype of partial sums are switches of the process. torch's default adds partial sums in 16 bits, and
    users turn TF32 on for their models.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        saved = (
            matmul.fp32_precision,
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        )
        try:
            matmul.fp32_precision = "tf32" if allow_tf32 else "ieee"
            matmul.allow_bf16_reduced_precision_reduction = False
            matmul.allow_fp16_reduced_precision_reduction = False
            yield
        finally:
            matmul.fp32_precision = saved[0]
            matmul.allow_bf16_reduced_precision_reduction = saved[1]
            matmul.allow_fp16_reduced_precision_reduction = saved[2]


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """``accumulator += a @ b`` with the accumulator in float32 or float64, (M, N); a (M, K); b (K, N)."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(a.to(accumulator.dtype), b.to(accumulator.dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, or float64 for float64 operands, (M, N); a (M, K); b (K, N)."""
    wide = accumulator_dtype(a.dtype)
    if a.dtype == wide:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda else torch.mm(a.to(wide), b.to(wide))
