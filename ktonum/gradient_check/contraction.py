"""All outputs of the checked function as one number, and how that number moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktonum.errors import CandidateError
from ktonum.gradient_check.checked_function import CheckedFunction, Directions, output_arrays

__all__ = ["Contraction", "carries_float32_only"]

#: Functions with more outputs than this are not searched for quanta: the rounding of so many averages into plain noise.
_FEW = 2**13


def carries_float32_only(*arrays: Tensor) -> bool:
    """Whether every float64 value is a float32 value, and some use more than 11 bits (small integers prove nothing)."""
    seen = [a.detach() for a in arrays if a.numel()]
    exact = all(bool((a == a.float()).all()) for a in seen)
    return exact and any(bool(((a != a.bfloat16()) & (a != a.half())).any()) for a in seen)


def _lowest_bits(array: Tensor) -> Tensor:
    """The value of each float64 element's last set bit; infinity for 0: every value so far is a multiple of it."""
    mantissa, exponent = torch.frexp(array)
    whole = (mantissa * 2.0**53).to(torch.int64)
    bits = torch.ldexp((whole & -whole).double(), exponent - 53)
    return torch.where(array == 0.0, torch.inf, bits)


@dataclass
class Contraction:
    """All checked outputs as one number, ``s = <u, F(x)>``, with F the outputs in one row.

    Attributes:
        function: The function.
        chosen: Which of its floating outputs take part.
        shapes: Shapes of these outputs, as real arrays.
        cotangent: u, float64, one dimension; 0 for an element that stays out because it is not finite at x.
        scale: The power of two in u that brings outputs far from 1 to numbers whose squares are numbers; 1 for others.
        base: F(x), float64; 0 where an element stays out.
        size: Root sum of squares of ``u F``, the largest met so far: the scale of rounding in s.
        size_here: The same at x.
        refusal: What fn last raised at a displaced point; empty where it has not.
        excluded: Which elements stay out, bool; None if all take part.
    """

    function: CheckedFunction
    chosen: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    cotangent: Tensor
    base: Tensor
    scale: float = 1.0
    size: float = 0.0
    refusal: str = ""
    excluded: Tensor | None = field(init=False)
    size_here: float = field(init=False)
    _weight: Tensor = field(init=False)
    _quantum: Tensor | None = None
    _unread: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        left_out = ~self.base.isfinite()
        self.excluded = left_out if bool(left_out.any()) else None
        self.base = self.base.masked_fill(left_out, 0.0)
        self._weight = self.cotangent.abs()
        self.size_here = self.measure(self.base)

    def row(self, result: Any) -> Tensor:
        """The chosen outputs of one call in one row, float64.

        Raises:
            CandidateError: Number or shapes of the outputs changed between calls.
        """
        arrays = [array for _, array in output_arrays(result)]
        if len(arrays) <= max(self.chosen):
            raise CandidateError(
                f"fn returned {len(arrays)} floating outputs without gradients recorded, fewer than with"
            )
        for k, shape in zip(self.chosen, self.shapes, strict=True):
            if arrays[k].shape != shape:
                raise CandidateError(
                    f"fn's output {k} changed its shape from {tuple(shape)} to {tuple(arrays[k].shape)}"
                )
        parts = [arrays[k].detach().reshape(-1).to(self.base.device) for k in self.chosen]
        row = parts[0] if len(parts) == 1 else torch.cat(parts)
        return row if self.excluded is None else row.masked_fill(self.excluded, 0.0)

    def displaced(self, directions: Directions, step: float) -> Tensor | None:
        """The row at ``x + step * direction``, or None where fn raises there: a point outside of its domain.

        Raises:
            CandidateError: Number or shapes of the outputs changed between calls.
            InputError: fn writes to its inputs.
        """
        try:
            return self.row(self.function.at(directions, step))
        except CandidateError:
            raise
        except Exception as error:
            if type(error).__module__.startswith("ktonum."):
                raise
            self.refusal = f"{type(error).__name__}: {error}"
            return None

    def measure(self, row: Tensor) -> float:
        """Root sum of squares of ``u F`` at this row; remembered in `size` when it is the largest yet."""
        size = float(torch.linalg.vector_norm(self.cotangent * row))
        self.size = max(self.size, size) if math.isfinite(size) else self.size
        return size

    def change(self, of_elements: float) -> float:
        """Root sum of squares of ``u`` times a change of every output element."""
        if of_elements == 0.0 or not self.cotangent.numel():
            return 0.0
        # Not the norm, because squares of scaled cotangents overflow.
        return of_elements * float(self._weight.amax()) * math.sqrt(self.cotangent.numel())

    def half_difference(self, directions: Directions, step: float) -> tuple[float, float]:
        """``(s(x + h d) - s(x - h d)) / 2`` and the bend ``sum |u (F(x + h d) + F(x - h d) - 2 F(x))|``: two calls.

        Both are NaN where fn is not defined. Differences are taken element by element before they are summed, so that
        what does not change cannot drown what does.
        """
        ahead = self.displaced(directions, step)
        behind = None if ahead is None else self.displaced(directions, -step)
        if ahead is None or behind is None:
            return math.nan, math.nan
        difference = ahead - behind
        odd = float(torch.dot(self.cotangent, difference)) / 2.0
        bend = float(torch.dot(self._weight, ahead.sub(self.base).add_(behind).sub_(self.base).abs_()))
        if not math.isfinite(odd + bend + self.measure(ahead)):  # overflow or NaN anywhere shows in one of the three
            return math.nan, math.nan
        if difference.numel() <= _FEW:
            self._unread.append(difference)
        return odd, bend

    @property
    def granularity(self) -> float:
        """Root sum of squares of ``u`` times the quantum of F: what all differences seen are multiples of, by element.

        A function whose last operation rounds coarsely (float32, or cancellation of large terms) moves in jumps of
        one quantum. At steps below it the differences repeat exactly, so no residual shows the rounding.
        """
        if self._unread:
            bits = _lowest_bits(torch.stack(self._unread)).amin(0)
            self._quantum = bits if self._quantum is None else torch.minimum(self._quantum, bits)
            self._unread.clear()
        if self._quantum is None:
            return 0.0
        known = self._quantum.masked_fill(self._quantum.isinf(), 0.0)
        return float(torch.linalg.vector_norm(self.cotangent * known))
