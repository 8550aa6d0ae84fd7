"""What a planted defect is. This module imports no kind of defect, and kinds do not import each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ktonum.measure.comparison import blocks

__all__ = ["Defect", "SizedDefect", "Sound", "changed_elements", "signs"]

# The number of evenly spaced elements or rows among which one of middle size is chosen.
_LOOKED_AT = 1024


@dataclass(frozen=True)
class Sound:
    """A tensor that a check passed, in which defects are planted.

    Attributes:
        actual: The tensor that the candidate returned, any shape and dtype. It is never changed.
        expected: The tensor that it is compared with, same shape; None if it is compared with more than one tensor.
    """

    actual: Tensor
    expected: Tensor | None = None

    @property
    def floating(self) -> bool:
        """Whether it has elements, and they are floating."""
        return self.actual.is_floating_point() and self.actual.numel() > 0

    @cached_property
    def root_mean_square(self) -> float:
        """Root of the sum of squares of the finite elements over the number of all elements.

        It is 0 if and only if all finite elements are 0.
        """
        if not self.floating:
            return 0.0

        def finite() -> Iterator[Tensor]:
            return (t.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for _, (t,) in blocks(self.actual))

        largest = max(float(t.abs().amax()) for t in finite())
        # Divide by the largest, because the squares of gradients of 1e-170 underflow.
        squares = sum(float((t / largest).square().sum()) for t in finite()) if largest else 0.0
        return largest * math.sqrt(squares / self.actual.numel())

    @cached_property
    def element(self) -> int | None:
        """The flat index of an element of middle magnitude among those that are finite and not zero, or None."""
        return _of_middle_size(self.actual.reshape(-1, 1)) if self.floating else None

    @property
    def rows(self) -> int:
        """The number of rows of `matrix`; 0 if the tensor has fewer than two dims or is not `floating`."""
        return self.actual.numel() // self.actual.shape[-1] if self.floating and self.actual.dim() > 1 else 0

    @cached_property
    def row(self) -> int | None:
        """The index of a row of middle magnitude among those that are finite and not zero, or None.

        It is also None if there are fewer than two rows.
        """
        return _of_middle_size(self.actual.reshape(self.rows, -1)) if self.rows > 1 else None

    def copy(self) -> Tensor:
        """A contiguous copy that may be changed."""
        return self.actual.clone(memory_format=torch.contiguous_format)

    def matrix(self, copy: Tensor) -> Tensor:
        """The copy as a matrix, (rows, last dim): all dims but the last are flattened."""
        return copy.view(self.rows, -1)


def _of_middle_size(matrix: Tensor) -> int | None:
    step = max(1, matrix.shape[0] // _LOOKED_AT)
    sizes = matrix[::step].double().abs().amax(1)
    usable = (sizes > 0) & sizes.isfinite()
    order = torch.where(usable, sizes, math.inf).argsort()
    return int(order[(int(usable.sum()) - 1) // 2]) * step if bool(usable.any()) else None


def changed_elements(tensor: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A changed copy of a tensor. It works on one block at a time, because a gradient may fill half of a GPU.

    Args:
        tensor: The tensor, which is not changed.
        change: Takes a block, flat and in float64, and the flat index of its first element. Returns the changed block,
            which is then rounded to the tensor's dtype.
    """
    changed = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    flat = changed.view(-1)
    for start, (block,) in blocks(tensor):
        flat[start : start + block.numel()] = change(block.double(), start)
    return changed


def signs(start: int, count: int, device: torch.device) -> Tensor:
    """+1 or −1 for each element, independent of rows and columns; (count,), float64. The sign of index 0 is +1.

    The sign is one bit of the flat index times 2³² over the golden ratio: multiplicative hashing, Knuth 1998, The Art
    of Computer Programming 3, 6.4.

    Args:
        start: The flat index of the first element.
        count: The number of elements.
        device: The device of the result.
    """
    index = torch.arange(start, start + count, device=device)
    return 1.0 - 2.0 * ((index * 2_654_435_769 >> 31) & 1).double()


@dataclass(frozen=True)
class Defect:
    """A kind of defect without a size.

    Attributes:
        name: A few words, e.g. ``one row zero``.
        plant: Makes the defective tensor, or returns None if the kind does not apply. The result may equal the sound
            tensor, for example if a sign is flipped that is the sign of zero.
    """

    name: str
    plant: Callable[[Sound], Tensor | None]


@dataclass(frozen=True)
class SizedDefect:
    """A kind of defect that can have any size.

    Attributes:
        name: A few words, e.g. ``scaling``.
        unit: The meaning of a size, e.g. ``by 1 + size``.
        plant: Makes the tensor with a defect of the given size, or returns None if the kind does not apply.
    """

    name: str
    unit: str
    plant: Callable[[Sound, float], Tensor | None]
