"""The function under a gradient check: counted calls on private copies, seeded directions, contracted differences.

Nothing here decides anything; `ktonum.gradcheck` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ktonum.declare.tensor_copies import private_copy
from ktonum.errors import CandidateError, InputError

__all__ = ["CheckedFunction", "Contraction", "carries_float32_only", "first_bad_element", "seeded_signs"]

#: Outputs of more elements are not searched for quanta: the rounding of so many elements averages into plain noise.
FEW = 4096

Directions = Mapping[int, torch.Tensor]


def seeded_signs(shape: Sequence[int], device: torch.device, *key: int) -> torch.Tensor:
    """Random signs times magnitudes drawn uniformly from [0.5, 1.5), in float64; ``key`` alone determines them.

    Signed, so rows that sum to zero are seen; bounded away from 0, so no element is overlooked; of unequal
    magnitudes, so that two wrong elements of equal size never cancel, which they do half of the time under the plain
    signs of Rademacher.
    """
    state = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state >> 1)
    draw = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 2.0 - 1.0
    return torch.where(draw < 0.0, draw - 0.5, draw + 0.5).to(device)


def carries_float32_only(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every float64 value is a float32 value, and some use more than 11 bits (small integers prove nothing)."""
    seen = [t.detach() for t in tensors if t.numel()]
    exact = all(bool((t == t.float().double()).all()) for t in seen)
    return exact and any(bool((t != t.bfloat16().double()).any() & (t != t.half().double()).any()) for t in seen)


def first_bad_element(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, or None."""
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return None
    return tuple(int(i) for i in bad.nonzero()[0])


def flat_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating tensors in a tensor or in nested tuples and lists, in order; everything else is skipped."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise InputError("fn returned a complex tensor; only real outputs are supported: return torch.view_as_real")
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from flat_tensors(item)


class CheckedFunction:
    """``fn`` with its inputs: counts calls, never hands out the caller's tensors, notices when fn writes to its own.

    Attributes:
        calls: Forward evaluations so far.
        budget: Most forward evaluations; the caller of `at` keeps to it.
    """

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Any], positions: Sequence[int], budget: int) -> None:
        self.fn = fn
        self.inputs = tuple(inputs)
        self.positions = tuple(positions)
        self.budget = budget
        self.calls = 0
        self._shared = [private_copy(x) if isinstance(x, torch.Tensor) else x for x in self.inputs]

    @property
    def pairs_left(self) -> int:
        """Central differences that the budget still allows."""
        return (self.budget - self.calls) // 2

    def with_graph(self) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """One call with gradients recorded: the leaves (in the order of ``positions``) and the floating outputs."""
        arguments = list(self._shared)
        for position in self.positions:
            x = self.inputs[position].detach()
            copy = private_copy(x)
            # Elements that share memory are handed over as they came, so that the layout stays what the caller tests.
            arguments[position] = (copy if copy.stride() == x.stride() else x).requires_grad_()
        with torch.enable_grad():
            outputs = self._call(arguments)
        return tuple(arguments[p] for p in self.positions), outputs

    def at(self, directions: Directions, step: float) -> list[torch.Tensor]:
        """The floating outputs at ``x + step * direction``, without gradients; other inputs stay where they are."""
        arguments = list(self._shared)
        for position, direction in directions.items():
            x = self.inputs[position]
            arguments[position] = private_copy(x, (x.detach().double() + step * direction).to(x.dtype))
        with torch.no_grad():
            return self._call(arguments)

    def _call(self, arguments: list[Any]) -> list[torch.Tensor]:
        versions = [a._version if isinstance(a, torch.Tensor) else 0 for a in arguments]
        self.calls += 1
        outputs = list(flat_tensors(self.fn(*arguments)))
        for position, (argument, version) in enumerate(zip(arguments, versions, strict=True)):
            if isinstance(argument, torch.Tensor) and argument._version != version:
                self._refuse_write(position)
        return outputs

    def refuse_hidden_writes(self) -> None:
        """Compare the copies that fn was given with the originals, for kernels write past torch's version counter.

        Raises:
            InputError: fn changed one of its inputs.
        """
        for position, (copy, x) in enumerate(zip(self._shared, self.inputs, strict=True)):
            if isinstance(x, torch.Tensor) and not bool(((copy == x) | ((copy != copy) & (x != x))).all()):
                self._refuse_write(position)

    def _refuse_write(self, position: int) -> None:
        raise InputError(
            f"fn writes to its input {position}; a gradient check needs a function that leaves its inputs alone: "
            f"clone the input inside fn, e.g. lambda *inputs: op(*(x.clone() for x in inputs))"
        )


def lowest_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The value of each float64 element's last set bit; infinity for 0: every value so far is a multiple of it."""
    mantissa, exponent = torch.frexp(tensor)
    whole = (mantissa * 2.0**53).to(torch.int64)
    bits = torch.ldexp((whole & -whole).double(), exponent - 53)
    return torch.where(tensor == 0.0, torch.inf, bits)


@dataclass
class Contraction:
    """All checked outputs as one number, ``s = sum_k <u_k, f_k(x)>``.

    Attributes:
        function: The function.
        chosen: Which of its floating outputs take part.
        cotangents: One float64 ``u_k`` for each.
        base: The outputs at x, float64.
        size: Root sum of squares of ``u_k f_k``, the largest met so far: the scale of rounding in s.
        quanta: For each output of at most `FEW` elements, what all differences seen are multiples of, by element.
    """

    function: CheckedFunction
    chosen: tuple[int, ...]
    cotangents: tuple[torch.Tensor, ...]
    base: tuple[torch.Tensor, ...]
    size: float = 0.0
    quanta: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def granularity(self) -> float:
        """Root sum of squares of ``u_k`` times the quantum of f_k.

        A function whose last operation rounds coarsely (float32, or cancellation of large terms) moves in jumps of
        one quantum. At steps below it the differences repeat exactly, so no residual shows the rounding.
        """
        squares = [
            float((self.cotangents[k] * torch.where(q.isinf(), 0.0, q)).square().sum()) for k, q in self.quanta.items()
        ]
        return math.sqrt(math.fsum(squares))

    def outputs_at(self, directions: Directions, step: float) -> tuple[torch.Tensor, ...]:
        """The chosen outputs at ``x + step * direction`` in float64.

        Raises:
            CandidateError: Number or shapes of the outputs changed between calls.
        """
        outputs = self.function.at(directions, step)
        if len(outputs) <= max(self.chosen):
            raise CandidateError(
                f"fn returned {len(outputs)} floating outputs without gradients recorded, fewer than with"
            )
        chosen = tuple(outputs[k].double() for k in self.chosen)
        for k, got, base in zip(self.chosen, chosen, self.base, strict=True):
            if got.shape != base.shape:
                raise CandidateError(
                    f"fn's output {k} changed its shape from {tuple(base.shape)} to {tuple(got.shape)}"
                )
        return chosen

    def measure(self, outputs: Sequence[torch.Tensor]) -> float:
        """Root sum of squares of ``u_k f_k`` at these outputs; remembered in `size` when it is the largest yet."""
        squares = [float((u * f).square().sum()) for u, f in zip(self.cotangents, outputs, strict=True)]
        size = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
        self.size = max(self.size, size) if math.isfinite(size) else self.size
        return size

    def half_difference(self, directions: Directions, step: float) -> tuple[float, float]:
        """``(s(x + h d) - s(x - h d)) / 2`` and the bend ``sum |u (f(x + h d) + f(x - h d) - 2 f(x))|``: two calls.

        Differences are taken element by element before they are summed, so that what does not change cannot drown
        what does.
        """
        ahead, behind = self.outputs_at(directions, step), self.outputs_at(directions, -step)
        if not math.isfinite(self.measure(ahead) + self.measure(behind)):
            return math.nan, math.nan
        for k, (a, b) in enumerate(zip(ahead, behind, strict=True)):
            if a.numel() <= FEW:
                bits = lowest_bits(a - b)
                self.quanta[k] = torch.minimum(self.quanta.get(k, bits), bits)
        odd = [float((u * (a - b)).sum()) for u, a, b in zip(self.cotangents, ahead, behind, strict=True)]
        bend = [
            float((u * (a + b - 2.0 * f)).abs().sum())
            for u, a, b, f in zip(self.cotangents, ahead, behind, self.base, strict=True)
        ]
        return math.fsum(odd) / 2.0, math.fsum(bend)
