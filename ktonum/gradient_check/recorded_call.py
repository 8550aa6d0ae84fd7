"""One call of the checked function with its graph, and the cotangents that it is differentiated with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.gradient_check.checked_function import CheckedFunction, output_arrays
from ktonum.gradient_check.contraction import Contraction
from ktonum.gradient_check.leaf import Leaf, real_array
from ktonum.gradient_check.seeded_signs import seeded_signs

__all__ = ["RecordedCall", "record"]

# Outputs of a size outside of 2 to the power of ±this are scaled: their squares would overflow or vanish.
_LARGEST_EXPONENT = 300


@dataclass(frozen=True)
class RecordedCall:
    """A call of fn with its graph, ready to be differentiated again and again.

    Attributes:
        leaves: The tensors that are differentiated.
        tensors: The copies of them that fn was given.
        outputs: The outputs that take part, with their graph: those that require grad, or all if none does.
        chosen: The places of these outputs among fn's floating outputs.
        constant: Whether no output requires grad. Then the outputs must not move with the inputs.
        arrays: The outputs as real float64 arrays, without graph.
        cotangents: One for each output, of its dtype and shape.
        scale: The power of two in the cotangents, if there is one output; otherwise 1.
    """

    leaves: Sequence[Leaf]
    tensors: Sequence[Tensor]
    outputs: Sequence[Tensor]
    chosen: tuple[int, ...]
    constant: bool
    arrays: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    scale: float

    def raw_gradients(
        self, cotangents: Sequence[Tensor] | None = None, outputs: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """One backward: a gradient for each leaf, None where autograd gave none.

        Args:
            cotangents: In place of `cotangents`: one for each output, of its dtype and shape.
            outputs: In place of `outputs`.
        """
        return list(
            torch.autograd.grad(
                self.outputs if outputs is None else outputs,
                self.tensors,
                self.cotangents if cotangents is None else cotangents,
                retain_graph=True,
                allow_unused=True,
            )
        )

    def gradients(
        self, cotangents: Sequence[Tensor] | None = None, outputs: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """`raw_gradients` as real float64 arrays, zeros for None."""
        raw = self.raw_gradients(cotangents, outputs)
        return [leaf.gradient(g) for leaf, g in zip(self.leaves, raw, strict=True)]

    def contraction(self, function: CheckedFunction) -> Contraction:
        """The outputs, contracted with the cotangents to one number, ready to be evaluated elsewhere."""
        device = self.arrays[0].device
        return Contraction(
            function,
            self.chosen,
            tuple(array.shape for array in self.arrays),
            _row([real_array(c) for c in self.cotangents], device),
            _row(self.arrays, device),
            self.scale,
        )


def record(function: CheckedFunction, seed: int) -> RecordedCall:
    """Call the function once, with gradients recorded.

    Args:
        function: The function. If it has no leaves or returns no floating tensor, the call has no outputs.
        seed: Seed of the cotangents.
    """
    tensors, result = function.with_graph()
    found = output_arrays(result) if tensors else []
    with_grad = tuple(k for k, (tensor, _) in enumerate(found) if tensor.requires_grad)
    chosen = with_grad or tuple(range(len(found)))
    outputs = [found[k][0] for k in chosen]
    arrays = [found[k][1].detach() for k in chosen]
    scales = _scales(arrays)
    return RecordedCall(
        leaves=function.leaves,
        tensors=tensors,
        outputs=outputs,
        chosen=chosen,
        constant=not with_grad,
        arrays=arrays,
        cotangents=_cotangents(arrays, outputs, scales, seed),
        scale=scales[0] if len(scales) == 1 else 1.0,
    )


def _scales(arrays: Sequence[Tensor]) -> list[float]:
    """A power of two for each output, to multiply its cotangent with.

    Several outputs are brought to a common size, so that the rounding of a large output does not hide a small one. A
    single output keeps its unit, unless its squares would overflow or vanish.
    """
    scales = []
    for array in arrays:
        known = array.nan_to_num(0.0, 0.0, 0.0)
        largest = float(known.abs().amax()) if known.numel() else 0.0
        exponent = 0
        if largest > 0.0:
            exponent = round(math.log2(largest) + math.log2(float(torch.linalg.vector_norm(known / largest))))
        if len(arrays) == 1 and abs(exponent) < _LARGEST_EXPONENT:
            exponent = 0
        scales.append(2.0 ** max(-1000, min(1000, -exponent)))
    return scales


def _cotangents(
    arrays: Sequence[Tensor], outputs: Sequence[Tensor], scales: Sequence[float], seed: int
) -> list[Tensor]:
    """Seeded random u_k of both signs, 1 for a single scalar output, and 0 for elements that are not finite."""
    if len(arrays) == 1 and arrays[0].numel() == 1:
        drawn = [torch.ones_like(arrays[0])]
    else:
        drawn = [seeded_signs(array.shape, array.device, seed, 0, k) for k, array in enumerate(arrays)]
    cotangents = []
    for array, output, scale, signs in zip(arrays, outputs, scales, drawn, strict=True):
        real = (scale * signs).masked_fill(~array.isfinite(), 0.0)
        cotangents.append((torch.view_as_complex(real) if output.is_complex() else real).to(output.dtype))
    return cotangents


def _row(arrays: Sequence[Tensor], device: torch.device) -> Tensor:
    parts = [array.reshape(-1).to(device) for array in arrays]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
