"""What a planted defect is. A leaf of `ktonum.power`: kinds of defects do not import one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ktonum.measure.comparison import blocks

__all__ = ["Defect", "SizedDefect", "Sound", "changed_elements", "signs"]

# Elements or rows looked at, evenly spaced, for one of middle size.
_LOOKED_AT = 1024


@dataclass(frozen=True)
class Sound:
    """A tensor that a check passed, in which defects are planted.

    Attributes:
        actual: As the candidate made it; never changed.
        expected: What it is held against, the same shape; None where that is more than one tensor.
    """

    actual: Tensor
    expected: Tensor | None = None

    @property
    def floating(self) -> bool:
        """Whether it has floating elements, and any at all."""
        return self.actual.is_floating_point() and self.actual.numel() > 0

    @cached_property
    def root_mean_square(self) -> float:
        """Of the finite elements; 0 if and only if all of these are."""
        if not self.floating:
            return 0.0

        def finite() -> Iterator[Tensor]:
            return (t.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for _, (t,) in blocks(self.actual))

        largest = max(float(t.abs().amax()) for t in finite())
        # Over the largest, or squares of gradients of 1e-170 would vanish.
        squares = sum(float((t / largest).square().sum()) for t in finite()) if largest else 0.0
        return largest * math.sqrt(squares / self.actual.numel())

    @cached_property
    def element(self) -> int | None:
        """The flat index of an element of middle magnitude among those that are neither zero nor without number."""
        return _of_middle_size(self.actual.reshape(-1, 1)) if self.floating else None

    @property
    def rows(self) -> int:
        """How many rows `matrix` has."""
        return self.actual.numel() // self.actual.shape[-1] if self.floating and self.actual.dim() > 1 else 0

    @cached_property
    def row(self) -> int | None:
        """The index of a row of middle magnitude among those that are not zero; None where there is one row at most."""
        return _of_middle_size(self.actual.reshape(self.rows, -1)) if self.rows > 1 else None

    def copy(self) -> Tensor:
        """A contiguous copy to change."""
        return self.actual.clone(memory_format=torch.contiguous_format)

    def matrix(self, copy: Tensor) -> Tensor:
        """A copy's rows, seen as a matrix: all dims but the last flattened."""
        return copy.view(self.rows, -1)


def _of_middle_size(matrix: Tensor) -> int | None:
    step = max(1, matrix.shape[0] // _LOOKED_AT)
    sizes = matrix[::step].double().abs().amax(1)
    usable = (sizes > 0) & sizes.isfinite()
    order = torch.where(usable, sizes, math.inf).argsort()
    return int(order[(int(usable.sum()) - 1) // 2]) * step if bool(usable.any()) else None


def changed_elements(tensor: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``change`` of the elements, rounded to the tensor's dtype; a block at a time, for a gradient may fill half a GPU.

    Args:
        tensor: Left as it is.
        change: Of a block, flat and float64, and the flat index of its first element.
    """
    changed = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    flat = changed.view(-1)
    for start, (block,) in blocks(tensor):
        flat[start : start + block.numel()] = change(block.double(), start)
    return changed


def signs(start: int, count: int, device: torch.device) -> Tensor:
    """±1 for elements by their flat index, the first one +1, without regard to rows and columns; float64.

    A bit of the index times 2³² over the golden ratio: multiplicative hashing, Knuth 1998, The Art of Computer
    Programming 3, 6.4.
    """
    index = torch.arange(start, start + count, device=device)
    return 1.0 - 2.0 * ((index * 2_654_435_769 >> 31) & 1).double()


@dataclass(frozen=True)
class Defect:
    """A kind of defect that is there or not.

    Attributes:
        name: A few words, e.g. ``one row zero``.
        plant: Makes the defective tensor; None where the kind does not apply. It may come out as it was, where that is
            what the defect makes of it.
    """

    name: str
    plant: Callable[[Sound], Tensor | None]

    @property
    def words(self) -> str:
        """The defect as a report calls it."""
        return self.name


@dataclass(frozen=True)
class SizedDefect:
    """A kind of defect of any size.

    Attributes:
        name: A few words, e.g. ``scaling``.
        unit: What a size means, e.g. ``by 1 + size``.
        plant: Makes the defective tensor of a given size; None where the kind does not apply.
    """

    name: str
    unit: str
    plant: Callable[[Sound, float], Tensor | None]

    @property
    def words(self) -> str:
        """The defect as a report calls it."""
        return f"{self.name}, {self.unit}"
