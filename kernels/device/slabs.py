"""Which exponentials a forward stores for its backward and where, and which the backward computes again.

There are two places to store them. One is a workspace of their own. The other is the memory that will hold the weight's
gradient. The backward writes the gradient slab by slab, so a slab may lie in the rows of vocabulary entries that the
backward has not reached yet. The exponentials of N tokens need N / H times the memory of their entries' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "DEFAULT_COMPUTED",
    "DEFAULT_WORKSPACE",
    "Slab",
    "SlabPlan",
    "Stretch",
    "Workspace",
    "row_stride",
    "stored_size",
]

#: Bytes of exponentials that a forward stores, by default: 16,384 tokens at a vocabulary of 151,936 in bf16.
DEFAULT_WORKSPACE = 5 * 2**30
#: Bytes of the exponentials that a backward computes at a time, where not all of them can be stored. Smaller slabs cost
#: time: the input's gradient is read and written once for each.
DEFAULT_COMPUTED = 512 * 2**20
# Tiles stay whole, and rows 128 bytes apart or more, if slabs begin and end at multiples of this.
_COLUMNS = 256
_ROW_STEP = 64
# One part in this many of the vocabulary is the first slab in the gradient's memory, and as many of the gradient's rows
# before it stay free. Each further slab may be N / H times as wide as the one before: the more rows stay free, the
# fewer slabs there are.
_BEFORE_FIRST = 16


@dataclass(frozen=True)
class Workspace:
    """How much memory exponentials may take.

    Attributes:
        size: Bytes in all, beside what lies in the memory of the weight's gradient.
        computed_at_a_time: Bytes of those that a backward computes at a time, where not all of them can be stored.
    """

    size: int = DEFAULT_WORKSPACE
    computed_at_a_time: int = DEFAULT_COMPUTED


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
        place: At which number of the memory of the weight's gradient the slab begins; None if it lies elsewhere.
    """

    first: int
    last: int
    place: int | None = None


def stored_size(rows: int, vocabulary: int, itemsize: int, workspace: Workspace) -> int:
    """How many exponentials a forward over at most ``rows`` rows stores in a workspace: as many as fit.

    If not all of them fit, some of the workspace is kept for those that the backward computes again.
    """
    everything = rows * row_stride(vocabulary)
    if everything * itemsize <= workspace.size:
        return everything
    return max(0, workspace.size - workspace.computed_at_a_time) // itemsize


def row_stride(columns: int) -> int:
    """How many numbers lie from one row of a slab of so many columns to the next."""
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
        """The plan for a workspace of ``size`` numbers.

        Args:
            rows, vocabulary, hidden: See `SlabPlan`.
            size: How many numbers the workspace holds.
            in_gradient: Whether the forward may store in the memory of the weight's gradient, too.
        """
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

    def computed(self, workspace: Workspace, itemsize: int) -> Iterator[Stretch]:
        """What the backward computes again, in the order of the columns.

        Args:
            workspace: For one slab in memory of its own.
            itemsize: Of an exponential.
        """
        width = self._own_width(workspace, itemsize)
        first = self.in_gradient[-1].last if self.in_gradient else self.columns
        while self.rows and first < self.vocabulary:
            # A slab of c columns fits behind the rows of the gradient that are written while it is read if
            # c · rows <= (left − c) · hidden.
            left = self.vocabulary - first
            wide = left * self.hidden // (self.rows + self.hidden) // _COLUMNS * _COLUMNS
            last = min(first + max(width, wide), self.vocabulary)
            yield Stretch(first, last, last * self.hidden if wide > width else None)
            first = last

    def own_size(self, workspace: Workspace, itemsize: int) -> int:
        """How many numbers the widest slab takes, of those that `computed` puts into memory of their own."""
        slabs = self.computed(workspace, itemsize)
        return max((self.rows * row_stride(s.last - s.first) for s in slabs if s.place is None), default=0)

    def instead_of_input(self, workspace: Workspace, itemsize: int) -> bool:
        """Whether the weighted hidden states are freed, so that slabs in memory of their own take their place."""
        return self._workspace_width(workspace, itemsize) < self.hidden

    def _own_width(self, workspace: Workspace, itemsize: int) -> int:
        return max(self._workspace_width(workspace, itemsize), self.hidden // _COLUMNS * _COLUMNS, _COLUMNS)

    def _workspace_width(self, workspace: Workspace, itemsize: int) -> int:
        return min(workspace.size, workspace.computed_at_a_time) // max(1, self.rows * itemsize) // _COLUMNS * _COLUMNS


def _in_gradient(rows: int, vocabulary: int, hidden: int, first: int) -> Iterator[Stretch]:
    """Stretches from ``first`` on. Their slabs lie, in order, behind the rows that are written while they are read."""
    total = vocabulary * hidden
    # The later the first slab begins, the wider it may be. But all slabs must fit behind that place.
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
