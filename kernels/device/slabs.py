"""Which exponentials a forward stores for its backward and where, and which the backward computes again.

There are two places to store them. A workspace of their own; and the memory that will hold the weight's gradient, of
which nothing is written before the backward, and then slab by slab: a slab may lie in the rows of vocabulary entries
that are still to come. Exponentials of N tokens need N / H times the memory of their entries' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

__all__ = ["DEFAULT_WORKSPACE", "Slab", "SlabPlan", "Stretch", "row_stride", "stored_size"]

#: Bytes of exponentials that a forward stores, unless told otherwise: 16,384 tokens at a vocabulary of 151,936 in bf16.
DEFAULT_WORKSPACE = 5 * 2**30
# Where not everything can be stored, the exponentials that are computed again have this many bytes at a time. Smaller
# slabs cost time: the input's gradient is read and written once for each.
_COMPUTED_AT_A_TIME = 512 * 2**20
# Tiles stay whole, and rows 128 bytes apart or more, if slabs begin and end at multiples of this.
_COLUMNS = 256
_ROW_STEP = 64
# This part of the gradient's memory lies before the first slab in it, and as many entries wide is that slab. Each
# further one may be N / H times as wide as the one before: the more is left free, the fewer slabs.
_BEFORE_FIRST = 16


@dataclass(frozen=True)
class Slab:
    """Exponentials of some vocabulary entries.

    Attributes:
        exponentials: e_tv, 0 at the targets, (N, columns).
        first_column: The vocabulary entry of the first column, a multiple of 256.
    """

    exponentials: Tensor
    first_column: int


@dataclass(frozen=True)
class Stretch:
    """Vocabulary entries [first, last) whose exponentials are a slab.

    Attributes:
        first: A multiple of 256.
        last: Likewise, or V.
        place: Where the slab begins in the memory of the weight's gradient, in numbers; None if it lies elsewhere.
    """

    first: int
    last: int
    place: int | None = None


def stored_size(rows: int, vocabulary: int, itemsize: int, workspace: int) -> int:
    """How many exponentials a forward over at most ``rows`` rows stores in a workspace: all that fit into its bytes.

    If not all of them fit, what the backward needs for the others comes off first.
    """
    everything = rows * row_stride(vocabulary)
    if everything * itemsize <= workspace:
        return everything
    return max(0, workspace - _COMPUTED_AT_A_TIME) // itemsize


def row_stride(columns: int) -> int:
    """How many numbers the rows of a slab of so many columns are apart."""
    return -(-columns // _ROW_STEP) * _ROW_STEP


@dataclass(frozen=True)
class SlabPlan:
    """How a vocabulary is cut.

    Attributes:
        rows: N, tokens.
        vocabulary: V.
        hidden: H, if the memory of the weight's gradient, (V, H), may hold slabs; else 0.
        columns: How many entries are stored in the workspace: V, or a multiple of 256.
        in_gradient: What a forward stores in the gradient's memory, behind those.
    """

    rows: int
    vocabulary: int
    hidden: int
    columns: int
    in_gradient: tuple[Stretch, ...]

    @classmethod
    def of(cls, rows: int, vocabulary: int, size: int, *, hidden: int = 0, in_gradient: bool = False) -> SlabPlan:
        """A workspace of ``size`` numbers; ``in_gradient``: the forward may store in the gradient's memory, too."""
        columns = vocabulary
        if not 0 < rows * row_stride(vocabulary) <= size:
            columns = size // max(1, rows) // _COLUMNS * _COLUMNS
        further = tuple(_in_gradient(rows, vocabulary, hidden, columns)) if rows and hidden and in_gradient else ()
        return cls(rows, vocabulary, hidden, columns, further)

    def stored(self, workspace: Tensor, gradient: Tensor | None) -> list[Slab]:
        """The slabs that a forward fills and its backward reads.

        Args:
            workspace: Flat.
            gradient: The memory of the weight's gradient, (V, H), contiguous, where the plan uses it.
        """
        found = []
        if self.columns and self.rows:
            found.append(self.slab(Stretch(0, self.columns), workspace))
        if gradient is not None:
            found += [self.slab(stretch, gradient) for stretch in self.in_gradient]
        return found

    def slab(self, stretch: Stretch, memory: Tensor) -> Slab:
        """A stretch's slab in its memory: the gradient's, or one of its own."""
        columns = stretch.last - stretch.first
        flat = memory.view(-1)[stretch.place or 0 :]
        stride = row_stride(columns)
        return Slab(flat[: self.rows * stride].view(self.rows, stride)[:, :columns], stretch.first)

    def computed(self, workspace: int, itemsize: int) -> Iterator[Stretch]:
        """What the backward computes again, one slab after the other.

        Args:
            workspace: Bytes for one slab in memory of its own.
            itemsize: Of an exponential.
        """
        width = self._own_width(workspace, itemsize)
        first = self.in_gradient[-1].last if self.in_gradient else self.columns
        while self.rows and first < self.vocabulary:
            # c columns of rows numbers each fit behind themselves if c rows <= (left - c) hidden.
            left = self.vocabulary - first
            wide = left * self.hidden // (self.rows + self.hidden) // _COLUMNS * _COLUMNS
            last = min(first + max(width, wide), self.vocabulary)
            yield Stretch(first, last, last * self.hidden if wide > width else None)
            first = last

    def own_size(self, workspace: int, itemsize: int) -> int:
        """How many numbers the widest of those takes that lies in memory of its own."""
        slabs = self.computed(workspace, itemsize)
        return max((self.rows * row_stride(s.last - s.first) for s in slabs if s.place is None), default=0)

    def instead_of_input(self, workspace: int, itemsize: int) -> bool:
        """Whether slabs in memory of their own take the place of the weighted hidden states, which go before them."""
        return self._workspace_width(workspace, itemsize) < self.hidden

    def _own_width(self, workspace: int, itemsize: int) -> int:
        return max(self._workspace_width(workspace, itemsize), self.hidden // _COLUMNS * _COLUMNS, _COLUMNS)

    def _workspace_width(self, workspace: int, itemsize: int) -> int:
        return min(workspace, _COMPUTED_AT_A_TIME) // max(1, self.rows * itemsize) // _COLUMNS * _COLUMNS


def _in_gradient(rows: int, vocabulary: int, hidden: int, first: int) -> Iterator[Stretch]:
    """Stretches from ``first`` on whose slabs lie, in their order, behind the rows that are written while they live."""
    total = vocabulary * hidden
    # The later the first slab begins, the wider it may be; and no later than leaves room for all.
    width = max(vocabulary // _BEFORE_FIRST // _COLUMNS, 1) * _COLUMNS
    place = max((first + width) * hidden, total - rows * row_stride(vocabulary - first))
    place = -(-place // _ROW_STEP) * _ROW_STEP
    while first < vocabulary:
        # Rows [first, last) of the gradient are written while the slab is read: last · hidden <= place.
        last = min(place // hidden, vocabulary)
        fits = rows * row_stride(last - first) <= total - place
        if last < vocabulary or not fits:
            width = last - first if fits else max(0, total - place) // rows
            last = first + width // _COLUMNS * _COLUMNS
        if last <= first:
            return
        yield Stretch(first, last, place)
        place += rows * row_stride(last - first)
        first = last
