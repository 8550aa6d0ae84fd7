"""Launching the kernels on plain (rows, hidden) tensors; nothing here knows of sequences, autograd or KTO."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.block_sizes import BlockSizes, Kernel, block_sizes
from ktonum.kernels.gradient_kernels import add_target_terms_kernel, probabilities_kernel
from ktonum.kernels.logsumexp_kernels import reduce_tiles_kernel, tile_statistics_kernel
from ktonum.kernels.products import accumulator_dtype

__all__ = [
    "INTERPRETED",
    "add_target_terms",
    "bias_partials",
    "check_support",
    "probabilities",
    "slab_dtype",
    "slab_scale",
    "token_logps",
]

#: Whether Triton's interpreter runs the kernels: decided by TRITON_INTERPRET when they are first imported.
INTERPRETED = not isinstance(tile_statistics_kernel, triton.JITFunction)

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

_ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


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
    """What a slab of probabilities is stored in: the operands' dtype, float32 for bfloat16 under the interpreter.

    The interpreter truncates on a cast to bfloat16; the caller rounds its float32 slab to nearest instead.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def slab_scale(dtype: torch.dtype) -> float:
    """The factor that slabs carry: in float16 a probability below 6e-5 is subnormal, below 6e-8 zero."""
    return 2.0**14 if dtype == torch.float16 else 1.0


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _blocks(operand: Tensor, kernel: Kernel) -> BlockSizes:
    return block_sizes(operand.dtype, kernel, capability=_capability(operand.device), interpreted=INTERPRETED)


def _tile_options(
    input: Tensor, weight: Tensor, bias: Tensor | None, blocks: BlockSizes, allow_tf32: bool
) -> dict[str, Any]:
    """The arguments that the logits kernels share."""
    options: dict[str, Any] = {
        "hidden": input.shape[1],
        "stride_input_row": input.stride(0),
        "stride_input_hidden": input.stride(1),
        "stride_weight_row": weight.stride(0),
        "stride_weight_hidden": weight.stride(1),
        "HAS_BIAS": bias is not None,
        "EVEN_HIDDEN": input.shape[1] % blocks.hidden == 0,
        "UPCAST": INTERPRETED and input.dtype == torch.bfloat16,
        "ACCUMULATOR": _ACCUMULATORS[accumulator_dtype(input.dtype)],
        "PRECISION": "tf32" if allow_tf32 and input.dtype == torch.float32 else "ieee",
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLUMNS": blocks.columns,
        "BLOCK_HIDDEN": blocks.hidden,
        "PROMOTE": blocks.promote,
        "GROUP": blocks.group,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    return options


def token_logps(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    """log softmax(x Wᵀ + b) at the target of each row, and the log of the softmax's denominator.

    Args:
        input: x, (N, H), any strides.
        weight: W, (V, H), any strides, dtype of ``input``.
        bias: b, (V,), contiguous, or None.
        target: (N,), int64, contiguous; values outside [0, V) give a log-probability of −lse, to be masked.
        allow_tf32: Let float32 products run in TF32.

    Returns:
        Log-probabilities and log-sum-exps, both (N,), float64.
    """
    rows, vocabulary = input.shape[0], weight.shape[0]
    blocks = _blocks(input, "statistics")
    tiles = triton.cdiv(vocabulary, blocks.columns)
    wide = accumulator_dtype(input.dtype)
    tile_max = torch.empty((tiles, rows), dtype=wide, device=input.device)
    tile_sum = torch.empty_like(tile_max)
    target_logit = torch.zeros(rows, dtype=wide, device=input.device)
    logsumexp = torch.empty(rows, dtype=torch.float64, device=input.device)
    logps = torch.empty_like(logsumexp)
    if rows == 0:
        return logps, logsumexp
    tile_statistics_kernel[(triton.cdiv(rows, blocks.rows) * tiles,)](
        input,
        weight,
        weight if bias is None else bias,
        target,
        tile_max,
        tile_sum,
        target_logit,
        row_count=rows,
        vocabulary=vocabulary,
        **_tile_options(input, weight, bias, blocks, allow_tf32),
    )
    reduce_rows = 128 if INTERPRETED else 32
    reduce_tiles_kernel[(triton.cdiv(rows, reduce_rows),)](
        tile_max,
        tile_sum,
        target_logit,
        logsumexp,
        logps,
        row_count=rows,
        tile_count=tiles,
        BLOCK_ROWS=reduce_rows,
        BLOCK_TILES=32,
    )
    return logps, logsumexp


def bias_partials(rows: int, weight: Tensor) -> Tensor:
    """Where `probabilities` puts the bias gradient of each row tile, (row tiles, V), in the accumulator's dtype."""
    blocks = _blocks(weight, "probabilities")
    shape = (triton.cdiv(rows, blocks.rows), weight.shape[0])
    return torch.empty(shape, dtype=accumulator_dtype(weight.dtype), device=weight.device)


def probabilities(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logsumexp: Tensor,
    *,
    slab: Tensor,
    slab_start: int,
    coefficients: Tensor,
    bias_sums: Tensor | None,
    allow_tf32: bool,
) -> None:
    """Fill ``slab`` with `slab_scale` · softmax(z_t)_v for the columns v from ``slab_start`` on, 0 at the targets.

    Args:
        input, weight, bias, target, allow_tf32: As for `token_logps`.
        logsumexp: From `token_logps`, (N,), float64.
        slab: (N, columns), of `slab_dtype`, rows of stride ``slab.stride(0)``.
        slab_start: First vocabulary entry of the slab.
        coefficients: c_t, (N,), accumulator's dtype; only ``bias_sums`` contains them.
        bias_sums: From `bias_partials`, filled for the slab's columns with Σ_t c_t (1[v = y_t] − p_tv); None to skip.
    """
    blocks = _blocks(input, "probabilities")
    rows, columns = slab.shape
    probabilities_kernel[(triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns),)](
        input,
        weight,
        weight if bias is None else bias,
        target,
        logsumexp,
        coefficients,
        slab,
        slab if bias_sums is None else bias_sums,
        row_count=rows,
        vocabulary=weight.shape[0],
        slab_start=slab_start,
        slab_columns=columns,
        stride_slab_row=slab.stride(0),
        BIAS_GRADIENT=bias_sums is not None,
        SLAB_SCALE=slab_scale(input.dtype),
        **_tile_options(input, weight, bias, blocks, allow_tf32),
    )


def add_target_terms(
    grad_rows: Tensor, first_target: int, input: Tensor, coefficients: Tensor, targets: tuple[Tensor, Tensor]
) -> None:
    """``grad_rows[v − first_target] += Σ_{t: y_t = v} coefficients_t x_t``, deterministic.

    Args:
        grad_rows: Rows of the weight's gradient from ``first_target`` on, (R, H), contiguous, accumulator's dtype.
        first_target: The vocabulary entry of the first row.
        input: x, (N, H), any strides.
        coefficients: (N,), accumulator's dtype.
        targets: `torch.sort` of the targets, (N,), int64, and where each came from; targets of other rows are left out.
    """
    rows, hidden = input.shape
    if rows == 0:
        return
    in_order, order = targets
    block_rows, block_hidden = (64, 256) if INTERPRETED else (32, 64)
    add_target_terms_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(hidden, block_hidden))](
        grad_rows,
        input,
        coefficients,
        in_order,
        order,
        row_count=rows,
        first_target=first_target,
        grad_rows=grad_rows.shape[0],
        hidden=hidden,
        stride_grad_row=grad_rows.stride(0),
        stride_input_row=input.stride(0),
        stride_input_hidden=input.stride(1),
        ACCUMULATOR=_ACCUMULATORS[accumulator_dtype(input.dtype)],
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=block_hidden,
    )
