"""Demands on a backward beside the right numbers: the same ones each time, for every cotangent that autograd makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ktonum.declare.tensor_copies import spaced_out
from ktonum.gradient_check.recorded_call import RecordedCall

__all__ = ["Backward", "Finding", "Tolerances"]

# Runs with the same cotangents before a difference is blamed on anything but chance.
_REPETITIONS = 4


@dataclass(frozen=True)
class Finding:
    """A defect of a derivative other than a wrong number.

    Attributes:
        words: One or more sentences that say what is wrong, without the last full stop.
        position: The differentiated tensor that shows it; None if all do.
    """

    words: str
    position: int | None = None


@dataclass(frozen=True)
class Tolerances:
    """How far two results of one backward may be apart.

    Attributes:
        rounding: For each tensor the largest norm of the difference that rounding in another order can make.
        repeat: The largest difference of any element between two runs with the same cotangents; None: as ``rounding``.
    """

    rounding: Sequence[float]
    repeat: float | None = None


@dataclass(frozen=True)
class _Gap:
    """Two gradients of the tensor at ``position`` that are too far apart."""

    position: int
    distance: float


@dataclass(frozen=True)
class Backward:
    """The backward of one call, and the searches for its defects. Each search returns None if it finds nothing.

    Attributes:
        call: The recorded call.
        gradients: The gradients of its first backward, float64.
        tolerances: How far two results may be apart.
    """

    call: RecordedCall
    gradients: Sequence[Tensor]
    tolerances: Tolerances

    def unsteady(self) -> Finding | None:
        """A result that depends on earlier runs, or on how the cotangents lie in memory.

        It makes every comparison meaningless, so it is searched for before finite differences are measured.
        """
        finding = None if self.tolerances.repeat is None else self.not_reentrant()
        return finding or self.strided() or self.expanded()

    def jitter(self) -> float:
        """The largest difference of any element between the first run and some more with the same cotangents."""
        runs = [self.call.gradients() for _ in range(_REPETITIONS)]
        return max(float((a - b).abs().amax()) for found in runs for a, b in zip(found, self.gradients, strict=True))

    def incomplete(self, *, undefined: bool, dtypes: bool, batched: bool) -> Finding | None:
        """A defect that right numbers can have.

        Args:
            undefined: Whether to ask for undefined cotangents.
            dtypes: Whether gradients must have the dtypes of their tensors.
            batched: Whether to ask for several cotangents at once, under vmap.
        """
        finding = self.one_by_one()
        if finding is None and dtypes:
            finding = self.wrong_dtype()
        if finding is None and undefined:
            finding = self.undefined()
        if finding is None and batched:
            finding = self.batched()
        return finding

    def name(self, position: int) -> str:
        return self.call.leaves[position].name

    def gap(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> _Gap | None:
        """The first pair of gradients that differ by more than rounding, or by more than two runs may."""
        repeat = self.tolerances.repeat or 0.0
        for position, (a, b, rounding) in enumerate(zip(found, wanted, self.tolerances.rounding, strict=True)):
            distance = float(torch.linalg.vector_norm(a - b))
            if not distance <= rounding + repeat * math.sqrt(a.numel()):
                return _Gap(position, distance)
        return None

    def repeated(self) -> _Gap | None:
        """The difference of one more run with the same cotangents, if it is too large."""
        found = self.call.gradients()
        if self.tolerances.repeat is None:
            return self.gap(found, self.gradients)
        for position, (a, b) in enumerate(zip(found, self.gradients, strict=True)):
            distance = float((a - b).abs().amax())
            if not distance <= self.tolerances.repeat:
                return _Gap(position, distance)
        return None

    def not_reentrant(self) -> Finding | None:
        for _ in range(_REPETITIONS):
            if (gap := self.repeated()) is not None:
                return Finding(
                    f"backward is not reentrant: two runs with the same cotangents gave gradients of "
                    f"{self.name(gap.position)} that differ by {gap.distance:.2g}. Its result must not depend on "
                    f"earlier calls, on random numbers, or on memory that it has not written",
                    gap.position,
                )
        return None

    def raised(self, error: Exception, when: str) -> Finding:
        """Tell a backward that cannot run twice from one that cannot take these cotangents."""
        try:
            self.call.gradients()
        except Exception as second:
            return Finding(f"backward is not reentrant: its second run raised {type(second).__name__}: {second}")
        return Finding(f"backward raised {type(error).__name__} {when}: {error}")

    def strided(self) -> Finding | None:
        """Cotangents that are not contiguous. This is also the second run that a defect of reentrancy shows in."""
        cotangents = [spaced_out(c) if c.ndim else c for c in self.call.cotangents]
        return self.elsewhere(cotangents, self.gradients, "for a cotangent that is not contiguous")

    def expanded(self) -> Finding | None:
        """Cotangents that are one number in memory, as the backward of sum() makes them."""
        if all(c.numel() <= 1 for c in self.call.cotangents):
            return None
        cotangents = [torch.ones((), dtype=c.dtype, device=c.device).expand(c.shape) for c in self.call.cotangents]
        wanted = self.call.gradients([c.contiguous() for c in cotangents])
        return self.elsewhere(cotangents, wanted, "for an expanded cotangent, as sum() makes it")

    def elsewhere(self, cotangents: Sequence[Tensor], wanted: Sequence[Tensor], when: str) -> Finding | None:
        """The same cotangents, laid out in memory in another way."""
        try:
            found = self.call.gradients(cotangents)
        except Exception as error:
            return self.raised(error, when)
        if (gap := self.gap(found, wanted)) is None:
            return None
        words = (
            f"backward gives another gradient of {self.name(gap.position)} {when}, off by {gap.distance:.2g}. It must "
            f"read the strides of the gradient that it is given, or make it contiguous"
        )
        return self.not_reentrant() or Finding(words, gap.position)

    def one_by_one(self) -> Finding | None:
        """Gradients from each output alone, where backward gets none of the others, against those of all outputs."""
        call = self.call
        if len(call.outputs) == 1:
            return None
        parts = []
        for k, (cotangent, output) in enumerate(zip(call.cotangents, call.outputs, strict=True)):
            try:
                parts.append(call.gradients([cotangent], [output]))
            except Exception as error:
                return self.raised(error, f"where only output {k} has a gradient. It must take None for the others")
        if (gap := self.gap([torch.stack(same).sum(0) for same in zip(*parts, strict=True)], self.gradients)) is None:
            return None
        words = (
            f"the gradient of {self.name(gap.position)} from all outputs is not the sum of those from each output "
            f"alone: they differ by {gap.distance:.2g}. Backward must do without the gradients of outputs that are "
            f"not used"
        )
        return self.not_reentrant() or Finding(words, gap.position)

    def wrong_dtype(self) -> Finding | None:
        for position, (raw, tensor) in enumerate(zip(self.call.raw_gradients(), self.call.tensors, strict=True)):
            if raw is not None and raw.dtype != tensor.dtype:
                words = (
                    f"the gradient of {self.name(position)} has the dtype {raw.dtype}, the tensor has {tensor.dtype}"
                )
                return Finding(words, position)
        return None

    def undefined(self) -> Finding | None:
        """Undefined cotangents, of all outputs at once and of each alone: of outputs that are not used further on."""
        outputs = self.call.outputs
        zeros = [torch.zeros_like(output) for output in outputs]
        everything = tuple(range(len(outputs)))
        for chosen in [everything, *([(k,) for k in everything] if len(everything) > 1 else [])]:
            which = "every output" if chosen == everything else f"output {chosen[0]}"
            given = [_without_gradient(o) if k in chosen else o for k, o in enumerate(outputs)]
            try:
                found = self.call.gradients(zeros, given)
            except Exception as error:
                return Finding(
                    f"backward raised {type(error).__name__} where the gradient of {which} is undefined (None): "
                    f"{error}. Treat None as zeros, or pass check_undefined_grad=False"
                )
            for position, gradient in enumerate(found):
                if bool((gradient != 0).any()):
                    words = (
                        f"backward gives {self.name(position)} a gradient that is not zero where the gradient of "
                        f"{which} is undefined (None) and all others are zero"
                    )
                    return Finding(words, position)
        return None

    def batched(self) -> Finding | None:
        """Two cotangents at once under vmap against one after the other."""
        call = self.call
        pairs = [torch.stack([c, -0.5 * c]) for c in call.cotangents]
        try:
            both = torch.autograd.grad(
                call.outputs, call.tensors, pairs, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except Exception as error:
            return Finding(f"backward raised {type(error).__name__} under vmap (check_batched_grad=True): {error}")
        for number in range(2):
            alone = call.gradients([pair[number] for pair in pairs])
            found = [leaf.gradient(None if g is None else g[number]) for leaf, g in zip(call.leaves, both, strict=True)]
            if (gap := self.gap(found, alone)) is not None:
                words = (
                    f"backward under vmap (check_batched_grad=True) gives another gradient of "
                    f"{self.name(gap.position)}, off by {gap.distance:.2g}"
                )
                return Finding(words, gap.position)
        return None


def _without_gradient(output: Tensor) -> Tensor:
    """The output behind a node whose gradient is undefined."""
    return cast(Tensor, torch._C._functions.UndefinedGrad()(output))
