"""Runs a function under audit once and returns its outputs and gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktonum.errors import CandidateError

__all__ = ["Evaluation", "Run", "evaluate", "named_outputs", "tensors_like", "upcast"]


@dataclass(frozen=True)
class Evaluation:
    """The results of one run.

    Attributes:
        outputs: The outputs by name, detached; None for an output that the function does not have.
        gradients: Gradients of Σ_k ⟨upstream_k, output_k⟩ by input name; None if autograd returned None.
        differentiable: Names of the outputs that required grad.
    """

    outputs: Mapping[str, Tensor | None]
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """All outputs and gradients that are not None, by name; a gradient's name is ``grad_INPUT``."""
        named = {**self.outputs, **{f"grad_{name}": g for name, g in self.gradients.items()}}
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True)
class Run:
    """The arguments of one run: inputs and parameters by name, upstream gradients by output name."""

    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any]
    upstream: Mapping[str, Tensor]


def named_outputs(returned: Any) -> dict[str, Tensor | None]:
    """Outputs by name. A mapping keeps its names, one tensor is ``output``, several are ``output0``, ``output1``, ...

    Raises:
        CandidateError: The function did not return a tensor, a sequence or a mapping, or an output is neither a tensor
            nor None.
    """
    if isinstance(returned, Tensor):
        returned = {"output": returned}
    elif isinstance(returned, Sequence) and not isinstance(returned, str):
        returned = {f"output{i}": r for i, r in enumerate(returned)}
    if not isinstance(returned, Mapping):
        raise CandidateError(
            f"returned a {type(returned).__name__}: return a tensor, a sequence or a mapping of tensors"
        )
    for name, value in returned.items():
        if value is not None and not isinstance(value, Tensor):
            raise CandidateError(
                f"returned a {type(value).__name__} as output {name!r}: return a tensor, or None if there is none"
            )
    return dict(returned)


def upcast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``inputs`` with floating tensors converted to ``dtype``; all else is unchanged."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def tensors_like(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``inputs`` with the named tensors detached and requiring grad. Strides and memory stay the same."""
    return {k: v.detach().requires_grad_() if k in names else v for k, v in inputs.items()}


def evaluate(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    differentiable: Sequence[str] = (),
    upstream: Mapping[str, Tensor] | None = None,
) -> Evaluation:
    """Run ``function(**inputs)`` and differentiate it.

    Args:
        function: Called with the inputs by name.
        inputs: Tensors and other values. They and their ``requires_grad`` are not modified here.
        differentiable: Names of the inputs to differentiate.
        upstream: Upstream gradients by output name, in the shape of the output; they are cast to its dtype. Other
            outputs are not differentiated. If None or empty, no gradients are computed, but ``differentiable`` inputs
            still require grad.

    Raises:
        CandidateError: An output in ``upstream`` is missing, has another shape, or does not require grad; or the
            function made another input require grad; or `named_outputs` raised it.
    """
    leaves = tensors_like(inputs, differentiable)
    outputs = named_outputs(function(**leaves))
    for name, leaf in leaves.items():
        if name not in differentiable and isinstance(leaf, Tensor) and leaf.requires_grad:
            raise CandidateError(f"made its input {name!r} require grad: leave requires_grad of inputs unchanged")
    detached = {name: None if t is None else t.detach() for name, t in outputs.items()}
    carrying = tuple(name for name, t in outputs.items() if t is not None and t.requires_grad)
    if not upstream:
        return Evaluation(detached, {}, carrying)
    roots, cotangents = [], []
    for name, cotangent in upstream.items():
        output = outputs.get(name)
        if output is None:
            raise CandidateError(
                f"returned no {name!r}, only {', '.join(k for k in outputs if outputs[k] is not None)}: return the "
                f"outputs of the reference"
            )
        if output.shape != cotangent.shape:
            raise CandidateError(
                f"returned {name!r} with shape {tuple(output.shape)}: return the reference's shape "
                f"{tuple(cotangent.shape)}"
            )
        if not output.requires_grad:
            raise CandidateError(
                f"returned {name!r} without requires_grad, but the reference's has it: do not detach it or use no_grad"
            )
        roots.append(output)
        cotangents.append(cotangent.to(output.dtype))
    gradients = torch.autograd.grad(
        roots, [leaves[name] for name in differentiable], grad_outputs=cotangents, allow_unused=True
    )
    # Detach them, because a backward may return a tensor that it saved, and that may require grad.
    named = {k: None if g is None else g.detach() for k, g in zip(differentiable, gradients, strict=True)}
    return Evaluation(detached, named, carrying)
