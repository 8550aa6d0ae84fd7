"""Which exponentials a forward stores for its backward, and which the backward computes again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

__all__ = ["SlabPlan", "stored_size"]

# Where not everything can be stored, the exponentials that are computed again have this many bytes at a time. Smaller
# slabs cost time: the input's gradient is read and written once for each.
_COMPUTED_AT_A_TIME = 512 * 2**20
# Tiles stay whole, and rows 128 bytes apart or more, if slabs begin and end at multiples of this.
_COLUMNS = 256
_ROW_STEP = 64


def stored_size(rows: int, vocabulary: int, itemsize: int, workspace: int) -> int:
    """How many exponentials a forward over at most ``rows`` rows stores: all that fit into ``workspace`` bytes.

    If not all of them fit, what the backward needs for the others comes off first.
    """
    everything = rows * _row_stride(vocabulary)
    if everything * itemsize <= workspace:
        return everything
    return max(0, workspace - _COMPUTED_AT_A_TIME) // itemsize


def _row_stride(columns: int) -> int:
    return -(-columns // _ROW_STEP) * _ROW_STEP


@dataclass(frozen=True)
class SlabPlan:
    """The first ``columns`` of the vocabulary's columns are stored.

    Attributes:
        rows: Tokens.
        vocabulary: V.
        columns: V, or a multiple of 256.
    """

    rows: int
    vocabulary: int
    columns: int

    @classmethod
    def of(cls, rows: int, vocabulary: int, size: int) -> SlabPlan:
        """What fits into ``size`` numbers."""
        if 0 < rows * _row_stride(vocabulary) <= size:
            return cls(rows, vocabulary, vocabulary)
        return cls(rows, vocabulary, size // max(1, rows) // _COLUMNS * _COLUMNS)

    def stored(self, flat: Tensor) -> Tensor | None:
        """The stored slab, (rows, columns), in the memory of ``flat``; None if there is none."""
        return _slab(flat, self.rows, self.columns) if self.columns and self.rows else None

    def computed(self, workspace: int, itemsize: int, spare: int = 0) -> Iterator[tuple[int, int, bool]]:
        """Slabs of the other columns: (first, last, whether it fits into spare memory).

        Args:
            workspace: Bytes for one slab.
            itemsize: Of an exponential.
            spare: Numbers for each vocabulary entry in memory that is free until those entries are done: a slab may lie
                in that of the entries behind its own.
        """
        width = min(workspace, _COMPUTED_AT_A_TIME) // max(1, self.rows * itemsize) // _COLUMNS * _COLUMNS
        width = max(_COLUMNS, width)
        first = self.columns
        while self.rows and first < self.vocabulary:
            # c columns of rows numbers each fit behind themselves if c rows <= (left - c) spare.
            wide = (self.vocabulary - first) * spare // (self.rows + spare) // _COLUMNS * _COLUMNS
            yield first, min(first + max(width, wide), self.vocabulary), wide > width
            first += max(width, wide)

    def computed_size(self, workspace: int, itemsize: int, spare: int = 0) -> int:
        """How many numbers the widest of those takes that do not fit into spare memory."""
        slabs = self.computed(workspace, itemsize, spare)
        return max((self.rows * _row_stride(last - first) for first, last, fits in slabs if not fits), default=0)

    def within(self, flat: Tensor, columns: int) -> Tensor:
        """A slab of that many columns in the memory of ``flat``, (rows, columns)."""
        return _slab(flat, self.rows, columns)


def _slab(flat: Tensor, rows: int, columns: int) -> Tensor:
    stride = _row_stride(columns)
    return flat[: rows * stride].view(rows, stride)[:, :columns]
