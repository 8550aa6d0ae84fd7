"""Launching the kernels that score rows of hidden states. Nothing here knows of sequences, autograd or KTO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.device.block_sizes import cdiv
from ktonum.kernels.device.hardware import INTERPRETED, slab_scale
from ktonum.kernels.device.logits.launch import Projection, Tiles, block_sizes_of, fill_tiles
from ktonum.kernels.device.products import accumulator_dtype
from ktonum.kernels.device.slabs import Slab
from ktonum.kernels.device.statistics.kernels import reduce_tiles_kernel, rescale_slab_kernel, target_logits_kernel
from ktonum.kernels.device.trace import note

__all__ = ["Projection", "RowStatistics", "exponentials", "row_statistics"]

# How many rows a program of `reduce_tiles_kernel` or `rescale_slab_kernel` looks at.
_ROWS = 128 if INTERPRETED else 16


@dataclass(frozen=True)
class RowStatistics:
    """What a forward keeps of each row, (N,) and float64 each.

    Attributes:
        logps: log π(y_t).
        others: 1 − π(y_t), without cancellation.
        shift: s_t, exact in the accumulator's dtype: exponentials are e_tv = 2^(z_tv log₂ e − s_t), times `slab_scale`.
        factor: f_t: p_tv = f_t e_tv.
    """

    logps: Tensor
    others: Tensor
    shift: Tensor
    factor: Tensor


def row_statistics(projection: Projection, statistics: RowStatistics, *, slabs: Sequence[Slab]) -> None:
    """log softmax(x Wᵀ + b) at the target of each row, and the shift that the row's exponentials are relative to.

    Args:
        projection: See there.
        statistics: Written.
        slabs: Filled as by `exponentials`. Of `slab_dtype`; in the order of their columns, from 0 on, without gaps.
    """
    rows, vocabulary = projection.input.shape[0], projection.weight.shape[0]
    if rows == 0:
        return
    device = projection.input.device
    wide = accumulator_dtype(projection.input.dtype)
    # The targets' logits lie where the targets' log-probabilities will.
    logit, target_shift = statistics.logps, torch.empty(rows, dtype=wide, device=device)
    _target_logits(projection, logit, target_shift)
    blocks = block_sizes_of(projection, slabs, stored=False)
    # All tiles share a table, so they have one width.
    width = blocks.columns
    tiles = Tiles(*torch.empty((2, cdiv(vocabulary, width), rows), dtype=wide, device=device).unbind())
    stored = 0
    for slab in slabs:
        columns = (stored, stored + slab.exponentials.shape[1])
        of_slab = block_sizes_of(projection, slabs, stored=True)
        fill_tiles(projection, target_shift, columns, of_slab, tiles=tiles, slab=slab.exponentials)
        stored = columns[1]
    fill_tiles(projection, target_shift, (stored, vocabulary), blocks, tiles=tiles)
    differ = torch.empty(cdiv(rows, _ROWS), dtype=torch.int32, device=device)
    reduce_tiles_kernel[(cdiv(rows, _ROWS),)](
        tiles.shift,
        tiles.sum,
        logit,
        target_shift,
        statistics.logps,
        statistics.others,
        statistics.shift,
        statistics.factor,
        differ,
        row_count=rows,
        tile_count=tiles.shift.shape[0],
        TILE_RELATIVE=projection.input.dtype == torch.float16,
        SLAB_SCALE=slab_scale(projection.input.dtype),
        BLOCK_ROWS=_ROWS,
        BLOCK_TILES=32,
    )
    note("reduce_tiles_kernel", projection.input.dtype, rows=rows, tiles=tiles.shift.shape[0])
    for slab in slabs:
        _rescale(slab, tiles, statistics.shift, differ, width)


def _target_logits(projection: Projection, logit: Tensor, shift: Tensor) -> None:
    x, w, bias = projection.input, projection.weight, projection.bias
    block_rows = 64 if INTERPRETED else 8
    target_logits_kernel[(cdiv(x.shape[0], block_rows),)](
        x,
        w,
        w if bias is None else bias,
        projection.target,
        logit,
        shift,
        row_count=x.shape[0],
        vocabulary=w.shape[0],
        hidden=x.shape[1],
        stride_input_row=x.stride(0),
        stride_input_hidden=x.stride(1),
        stride_weight_row=w.stride(0),
        stride_weight_hidden=w.stride(1),
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=256,
    )
    note("target_logits_kernel", x.dtype, rows=x.shape[0], hidden=x.shape[1])


def exponentials(projection: Projection, shift: Tensor, *, slab: Slab) -> None:
    """Fill ``slab`` with `slab_scale` · e_tv, 0 at the targets.

    Args:
        projection: As for `row_statistics`.
        shift: From there, (N,), float64.
        slab: Of `slab_dtype`, hidden stride 1.
    """
    e = slab.exponentials
    columns = (slab.first_column, slab.first_column + e.shape[1])
    fill_tiles(projection, shift, columns, block_sizes_of(projection, [slab], stored=True), slab=e)


def _rescale(slab: Slab, tiles: Tiles, shift: Tensor, differ: Tensor, width: int) -> None:
    rows, columns = slab.exponentials.shape
    at_a_time = 4
    # Few programs, because most find nothing to do: with one for each group of tiles it took 47 µs to find that.
    groups = min(16, cdiv(columns, width * at_a_time))
    rescale_slab_kernel[(groups, cdiv(rows, _ROWS))](
        slab.exponentials,
        tiles.shift,
        shift,
        differ,
        row_count=rows,
        first_tile=slab.first_column // width,
        column_count=columns,
        stride_slab_row=slab.exponentials.stride(0),
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=width,
        TILES=at_a_time,
        # 4,096 numbers of 32 bits, or half as many of 64.
        ROWS_AT_A_TIME=64 if INTERPRETED else 16 // tiles.shift.itemsize,
    )
    note("rescale_slab_kernel", slab.exponentials.dtype, rows=rows, columns=columns)
