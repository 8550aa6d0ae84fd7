"""Derivatives by forward-mode automatic differentiation: of the outputs along a direction, without backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ktonum.gradient_check.backward_passes import Finding
from ktonum.gradient_check.checked_function import CheckedFunction, Directions, output_arrays
from ktonum.gradient_check.contraction import Contraction
from ktonum.gradient_check.directional_derivative import Setting
from ktonum.gradient_check.result import GradcheckResult

__all__ = ["batched_forward_defect", "forward_defect", "forward_slope"]

# Directions of these probe numbers are drawn for no other purpose.
_FIRST = 2000
_BATCH = 2
# Forward mode may round differently from backward, and under vmap from itself.
_ROUNDINGS = 64.0
_VMAP_SHARE = 2.0**-40


def forward_slope(contraction: Contraction, directions: Directions) -> float:
    """The derivative of s along directions, float64, by one call of fn on dual tensors.

    Raises:
        Exception: Any exception that fn raises, e.g. because it has no forward-mode derivative.
    """
    function = contraction.function
    with forward_ad.dual_level():
        result = function.call({p: _dual(function, p, d) for p, d in directions.items()})
        tangents = []
        for tensor, array in output_arrays(result):
            tangent = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
            tangents.append(torch.zeros_like(array) if tangent is None else tangent.detach())
    return float(torch.dot(contraction.cotangent, contraction.row(tangents)))


def _dual(function: CheckedFunction, position: int, direction: Tensor) -> Tensor:
    leaf = function.leaves[position]
    # With a graph, too: fn may differentiate by itself, as the function that `ktonum.gradgradcheck` checks does.
    value, tangent = leaf.tensor().requires_grad_(), leaf.tensor(direction.clone())
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def forward_defect(setting: Setting, result: GradcheckResult) -> Finding | None:
    """Compare forward-mode derivatives with the gradients that finite differences have confirmed.

    Args:
        setting: The values of the check, with gradients from backward.
        result: The result for these gradients, which says how well they are known.

    Raises:
        Exception: Any exception that fn raises, e.g. because it has no forward-mode derivative.
    """
    assert setting.gradients is not None
    for position, leaf in enumerate(setting.leaves):
        direction = setting.direction(position, _FIRST)
        forward = forward_slope(setting.contraction, {position: direction})
        backward = setting.slope(position, direction)
        size = float(torch.linalg.vector_norm(setting.gradients[position] * direction))
        power = result.inputs[position].relative_power
        allowed = (power if math.isfinite(power) else 0.0) * size
        allowed += _ROUNDINGS * setting.analytic_eps * (size + setting.contraction.size)
        if not abs(forward - backward) <= allowed:
            words = (
                f"the forward-mode derivative along {leaf.name} is wrong: it is {forward:.12g}, and the gradient from "
                f"backward, which agrees with finite differences, gives {backward:.12g}"
            )
            return Finding(words, position)
    return None


def batched_forward_defect(setting: Setting) -> Finding | None:
    """Compare forward-mode derivatives under vmap with those without.

    Args:
        setting: The values of the check.
    """
    contraction, leaves = setting.contraction, setting.leaves
    function = contraction.function
    directions = [{p: setting.direction(p, _FIRST + number) for p in range(len(leaves))} for number in range(_BATCH)]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor, _ in output_arrays(function.call(dict(enumerate(tensors)))))

    values = tuple(leaf.tensor() for leaf in leaves)

    def derivative(*tangents: Tensor) -> Any:
        return torch.func.jvp(outputs, values, tangents)[1]

    stacked = [torch.stack([leaf.tensor(d[p]) for d in directions]) for p, leaf in enumerate(leaves)]
    try:
        together = torch.func.vmap(derivative)(*stacked)
    except Exception as error:
        return Finding(
            f"forward-mode AD raised {type(error).__name__} under vmap (check_batched_forward_grad=True): {error}"
        )
    for number, direction in enumerate(directions):
        alone = forward_slope(contraction, direction)
        row = contraction.row([tangent[number] for tangent in together])
        batched = float(torch.dot(contraction.cotangent, row))
        size = float(torch.linalg.vector_norm(contraction.cotangent * row))
        if not abs(batched - alone) <= _VMAP_SHARE * (size + abs(alone)):
            return Finding(
                f"the forward-mode derivative under vmap (check_batched_forward_grad=True) is {batched:.12g}, and "
                f"{alone:.12g} without vmap"
            )
    return None
