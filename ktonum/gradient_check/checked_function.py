"""The function under a gradient check: counted calls on private copies, seeded directions, contracted differences.

This module measures. `ktonum.gradient_check.verdict` decides.
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

#: Larger outputs are not searched for quanta, because the rounding of so many elements averages into plain noise.
FEW = 4096

Directions = Mapping[int, torch.Tensor]


def seeded_signs(shape: Sequence[int], device: torch.device, *key: int) -> torch.Tensor:
    """Random signs times magnitudes drawn uniformly from [0.5, 1.5), in float64; ``key`` alone determines them.

    The signs make rows visible that sum to zero. No element is overlooked, because magnitudes are bounded away from 0.
    Magnitudes differ so that two errors of equal size do not cancel. Under plain random signs (Rademacher), they cancel
    half of the time.
    """
    state = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state >> 1)
    draw = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 2.0 - 1.0
    return torch.where(draw < 0.0, draw - 0.5, draw + 0.5).to(device)


def carries_float32_only(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all values are float32 values, and at least one tensor has values that both 16-bit formats would round.

    The second condition is necessary because small integers, for example, are float32 values and prove nothing.
    """
    seen = [t.detach() for t in tensors if t.numel()]
    exact = all(bool((t == t.float().double()).all()) for t in seen)
    return exact and any(bool((t != t.bfloat16().double()).any() & (t != t.half().double()).any()) for t in seen)


def first_bad_element(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, or None if there is none."""
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return None
    return tuple(int(i) for i in bad.nonzero()[0])


def flat_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating tensors in a tensor or in nested tuples and lists, in order; everything else is skipped.

    Raises:
        InputError: One of the tensors is complex.
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise InputError("fn returned a complex tensor; outputs must be real: return torch.view_as_real(output)")
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from flat_tensors(item)


class CheckedFunction:
    """``fn`` with its inputs. It counts calls, passes copies of the tensors, and notices when fn writes to them.

    Attributes:
        fn: The function.
        inputs: The caller's inputs, which are never modified.
        positions: Positions of the inputs to differentiate.
        calls: Forward evaluations so far.
        budget: The most forward evaluations. The caller of `at` must respect it.
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
        """How many central differences the budget still allows; each takes two evaluations."""
        return (self.budget - self.calls) // 2

    def with_graph(self) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """Call fn once with gradients recorded.

        Returns:
            The leaves in the order of ``positions``, and the floating outputs.

        Raises:
            InputError: fn writes to an input, or returns a complex tensor.
        """
        arguments = list(self._shared)
        for position in self.positions:
            x = self.inputs[position].detach()
            copy = private_copy(x)
            # A copy of elements that share memory has another layout. Pass these as they are, to test the given layout.
            arguments[position] = (copy if copy.stride() == x.stride() else x).requires_grad_()
        with torch.enable_grad():
            outputs = self._call(arguments)
        return tuple(arguments[p] for p in self.positions), outputs

    def at(self, directions: Directions, step: float) -> list[torch.Tensor]:
        """The floating outputs at ``x + step * direction``, without gradients; other inputs keep their values."""
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
        """Compare the copies that fn was given with the originals. Kernels can write without torch's version counter.

        Raises:
            InputError: fn changed one of its inputs.
        """
        for position, (copy, x) in enumerate(zip(self._shared, self.inputs, strict=True)):
            if isinstance(x, torch.Tensor) and not bool(((copy == x) | ((copy != copy) & (x != x))).all()):
                self._refuse_write(position)

    def _refuse_write(self, position: int) -> None:
        raise InputError(
            f"fn writes to its input {position}; a gradient check needs a function that does not change its inputs: "
            f"clone the inputs inside fn, e.g. lambda *inputs: op(*(x.clone() for x in inputs))"
        )


def lowest_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The value of the last set bit of each float64 element; infinity for 0, which is a multiple of any number."""
    mantissa, exponent = torch.frexp(tensor)
    whole = (mantissa * 2.0**53).to(torch.int64)
    bits = torch.ldexp((whole & -whole).double(), exponent - 53)
    return torch.where(tensor == 0.0, torch.inf, bits)


@dataclass
class Contraction:
    """All checked outputs as one number, ``s = sum_k <u_k, f_k(x)>``.

    Attributes:
        function: The function.
        chosen: Indices of the floating outputs that take part.
        cotangents: The float64 ``u_k`` of each chosen output, in its shape.
        base: The chosen outputs at x, float64.
        size: The largest root sum of squares of ``u_k f_k`` so far. Rounding errors in s are proportional to it.
        quanta: For each chosen output of at most `FEW` elements: the largest power of two, for each element, of which
            all differences so far are multiples.
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

        If the last operation of fn rounds coarsely (float32, or cancellation of large terms), its outputs change in
        jumps of one quantum. At steps too small for a jump, the differences repeat exactly, and then the residual of a
        fit does not show the rounding.
        """
        squares = [
            float((self.cotangents[k] * torch.where(q.isinf(), 0.0, q)).square().sum()) for k, q in self.quanta.items()
        ]
        return math.sqrt(math.fsum(squares))

    def outputs_at(self, directions: Directions, step: float) -> tuple[torch.Tensor, ...]:
        """The chosen outputs at ``x + step * direction`` in float64.

        Raises:
            CandidateError: The number or the shapes of the outputs changed between calls.
        """
        outputs = self.function.at(directions, step)
        if len(outputs) <= max(self.chosen):
            raise CandidateError(
                f"fn returned {len(outputs)} floating outputs without gradients recorded, and more with them; "
                f"return the same outputs in every call"
            )
        chosen = tuple(outputs[k].double() for k in self.chosen)
        for k, got, base in zip(self.chosen, chosen, self.base, strict=True):
            if got.shape != base.shape:
                raise CandidateError(
                    f"output {k} of fn changed its shape from {tuple(base.shape)} to {tuple(got.shape)} between calls; "
                    f"return the same shapes in every call"
                )
        return chosen

    def measure(self, outputs: Sequence[torch.Tensor]) -> float:
        """Root sum of squares of ``u_k f_k`` at these outputs, NaN if it is not finite. Updates `size`."""
        squares = [float((u * f).square().sum()) for u, f in zip(self.cotangents, outputs, strict=True)]
        size = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
        self.size = max(self.size, size) if math.isfinite(size) else self.size
        return size

    def half_difference(self, directions: Directions, step: float) -> tuple[float, float]:
        """``(s(x + h d) - s(x - h d)) / 2`` and the bend ``sum |u (f(x + h d) + f(x - h d) - 2 f(x))|``: two calls.

        Differences are taken for each element before they are summed, so that rounding errors of large constant
        elements do not hide changes of small ones. Both numbers are NaN where fn is not finite.
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
