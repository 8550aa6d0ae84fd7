"""Launching the kernels that make softmax statistics and exponentials from hidden states and a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ktonum.kernels.device.block_sizes import BlockSizes, block_sizes, cdiv
from ktonum.kernels.device.hardware import INTERPRETED, capability, programs, serves_descriptors, slab_scale
from ktonum.kernels.device.logits.kernels import logits_kernel
from ktonum.kernels.device.products import full_precision_products
from ktonum.kernels.device.slabs import Slab
from ktonum.kernels.device.softmax.kernels import LOG2_E, softmax_kernel
from ktonum.kernels.device.trace import note

__all__ = ["LOGITS_AT_A_TIME", "Projection", "Tiles", "block_sizes_of", "fill_tiles"]

# Tensor cores lose a part of an inner product; this is that part for each of its terms. On an H100 log-sum-exps of bf16
# logits at hidden size 4096 were short by 3.8e-6 to 4.1e-6 of E_p z, on data of mean zero, with outlier dimensions, of
# mean 0.5 and with peaked softmaxes. Products over 32,768 and 151,936 terms were short by 3.1e-5 and 1.48e-4. (If every
# term has the same sign, three times as much is lost.)
_TRUNCATION = 9.6e-10
#: Bytes of logits of 32 and 64 bits that exist at a time, if no slab holds them.
LOGITS_AT_A_TIME = 256 * 2**20


@dataclass(frozen=True)
class Projection:
    """Hidden states, the head that projects them to logits, and the targets of its rows.

    Attributes:
        input: x, (N, H), any strides.
        weight: W, (V, H), any strides, dtype of ``input``.
        bias: b, (V,), contiguous, or None.
        target: (N,), int64, contiguous. A target outside [0, V) is scored as if its logit were 0; the caller masks it.
        allow_tf32: Let float32 products run in TF32.
        limit: How many of the rows are needed, (1,), int64, if only the device knows it; None for all. The results of
            other rows are arbitrary, and 16-bit products leave them out.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    allow_tf32: bool
    limit: Tensor | None = None


@dataclass(frozen=True)
class Tiles:
    """Softmax statistics of each (row, tile): the shift of its exponentials, and their sum; (column tiles of V, N)."""

    shift: Tensor
    sum: Tensor


def block_sizes_of(projection: Projection, slabs: Sequence[Slab], *, stored: bool) -> BlockSizes:
    """The tile shape for a pass that stores exponentials or not; ``slabs`` share statistics, so the way of loading."""
    x = projection.input
    return block_sizes(
        x.dtype,
        capability=capability(x.device),
        interpreted=INTERPRETED,
        descriptors=serves_descriptors(x, projection.weight, *(s.exponentials for s in slabs)),
        stored=stored,
    )


def fill_tiles(
    projection: Projection,
    shift: Tensor,
    columns: tuple[int, int],
    blocks: BlockSizes,
    *,
    tiles: Tiles | None = None,
    slab: Tensor | None = None,
) -> None:
    """`ktonum.kernels.device.softmax.kernels.tile_exponentials` of the columns [first, last).

    Args:
        projection: See there.
        shift: s_t, (N,), float64 or the accumulator's dtype.
        columns: First a multiple of 256.
        blocks: From `block_sizes_of`.
        tiles: Written, if given.
        slab: Written, (N, last − first), of `slab_dtype`, if given.
    """
    if columns[0] >= columns[1]:
        return
    if projection.input.dtype.itemsize > 2:
        for part, logits in _logits(projection, columns, slab, blocks.columns):
            _softmax(projection, shift, part, blocks, logits, tiles=tiles, stored=slab is not None)
    else:
        _fused(projection, shift, columns, blocks, tiles=tiles, slab=slab)


def _fused(
    projection: Projection,
    shift: Tensor,
    columns: tuple[int, int],
    blocks: BlockSizes,
    *,
    tiles: Tiles | None,
    slab: Tensor | None,
) -> None:
    x, w, bias = projection.input, projection.weight, projection.bias
    (rows, hidden), (first, last) = x.shape, columns
    count = cdiv(rows, blocks.rows) * cdiv(last - first, blocks.columns)
    operands: tuple[Any, Any, Any] = (x, w, x if slab is None else slab)
    if blocks.descriptors:
        rows_of_x = TensorDescriptor.from_tensor(x, [blocks.rows, blocks.hidden])
        columns_of_w = TensorDescriptor.from_tensor(w, [blocks.columns, blocks.hidden])
        written = rows_of_x
        if slab is not None:
            # Half a tile's columns, as the kernel stores them.
            written = TensorDescriptor.from_tensor(slab, [blocks.rows, blocks.columns // 2])
        operands = (rows_of_x, columns_of_w, written)
    corrected = blocks.descriptors and not INTERPRETED
    logits_kernel[(programs(x.device, count, persistent=blocks.descriptors),)](
        *operands,
        w if bias is None else bias,
        projection.target,
        shift,
        shift if tiles is None else tiles.shift,
        shift if tiles is None else tiles.sum,
        projection.target if projection.limit is None else projection.limit,
        row_count=rows,
        first_column=first,
        column_count=last - first,
        hidden=hidden,
        # log₂ e, times what makes up for truncation if the product is not promoted.
        scale=float(LOG2_E.value) * (1 + _TRUNCATION * hidden * corrected),
        stride_input_row=x.stride(0),
        stride_input_hidden=x.stride(1),
        stride_weight_row=w.stride(0),
        stride_weight_hidden=w.stride(1),
        stride_slab_row=0 if slab is None else slab.stride(0),
        DESCRIPTORS=blocks.descriptors,
        HAS_BIAS=bias is not None,
        HAS_LIMIT=projection.limit is not None,
        STATISTICS=tiles is not None,
        STORE=slab is not None,
        TILE_RELATIVE=slab is not None and x.dtype == torch.float16,
        SLAB_SCALE=slab_scale(x.dtype),
        EVEN_HIDDEN=hidden % blocks.hidden == 0,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_HIDDEN=blocks.hidden,
        PROMOTE=blocks.promote,
        GROUP=blocks.group,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    note(
        "logits_kernel",
        x.dtype,
        statistics=tiles is not None,
        stored=slab is not None,
        descriptors=blocks.descriptors,
        rows=rows,
        columns=last - first,
        hidden=hidden,
    )


def _logits(
    projection: Projection, columns: tuple[int, int], slab: Tensor | None, step: int
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """x Wᵀ of float32 and float64, stretch by stretch, in the slab or in memory that all stretches use in turn.

    The library computes it: for 2,048 × 2,048 × 32,000 in float32 on an H100 it takes 5 ms, where a kernel on ordinary
    cores took 20.
    """
    x, w = projection.input, projection.weight
    width = max(1, LOGITS_AT_A_TIME // (x.itemsize * x.shape[0]) // step) * step
    with full_precision_products(x.device, allow_tf32=projection.allow_tf32):
        memory: Tensor | None = None
        for first in range(*columns, width):
            last = min(first + width, columns[1])
            if slab is not None:
                logits = slab[:, first - columns[0] : last - columns[0]]
            else:
                memory = x.new_empty(x.shape[0] * (last - first)) if memory is None else memory
                logits = memory[: x.shape[0] * (last - first)].view(x.shape[0], last - first)
            torch.mm(x, w[first:last].t(), out=logits)
            note("logits_product", x.dtype, rows=x.shape[0], columns=last - first, hidden=x.shape[1])
            yield (first, last), logits


def _softmax(
    projection: Projection,
    shift: Tensor,
    columns: tuple[int, int],
    blocks: BlockSizes,
    logits: Tensor,
    *,
    tiles: Tiles | None,
    stored: bool,
) -> None:
    rows, count = logits.shape
    softmax_kernel[(cdiv(count, blocks.columns), cdiv(rows, blocks.rows))](
        logits,
        logits if projection.bias is None else projection.bias,
        projection.target,
        shift,
        shift if tiles is None else tiles.shift,
        shift if tiles is None else tiles.sum,
        row_count=rows,
        first_column=columns[0],
        column_count=count,
        stride_logits_row=logits.stride(0),
        HAS_BIAS=projection.bias is not None,
        STATISTICS=tiles is not None,
        STORE=stored,
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )
    note("softmax_kernel", logits.dtype, statistics=tiles is not None, stored=stored, rows=rows, columns=count)
