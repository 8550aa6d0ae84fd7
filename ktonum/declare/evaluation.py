"""Running a function under audit once: outputs and gradients, by name."""

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
    """One run.

    Attributes:
        outputs: The outputs by name, detached; None where the function lacks one.
        gradients: Gradients of Σ_k ⟨upstream_k, output_k⟩ by input name; None where autograd returned none.
        differentiable: Names of the outputs that carried a gradient.
    """

    outputs: Mapping[str, Tensor | None]
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Outputs and gradients (as ``grad_NAME``) that exist."""
        named = {**self.outputs, **{f"grad_{name}": g for name, g in self.gradients.items()}}
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True)
class Run:
    """What a run of an op consists of: inputs and parameters by name, upstream gradients by output name."""

    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any]
    upstream: Mapping[str, Tensor]


def named_outputs(returned: Any) -> dict[str, Tensor | None]:
    """Outputs by name: a mapping keeps its names, one tensor is ``output``, several are ``output0``, ``output1`` ...

    Raises:
        CandidateError: Something returned is neither a tensor nor None.
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
            raise CandidateError(f"output {name!r} is a {type(value).__name__}: return tensors, or None for no output")
    return dict(returned)


def upcast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``inputs`` with floating tensors in ``dtype``; everything else as it is."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def tensors_like(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``inputs`` with the named tensors detached and requiring gradients; strides are kept."""
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
        function: Takes the inputs by name.
        inputs: Tensors and others; not modified, nor do the tensors' ``requires_grad`` change.
        differentiable: Inputs to differentiate.
        upstream: Upstream gradients by output name; outputs not named are not differentiated. Cast to their output's
            dtype. None or empty: no gradients, but ``differentiable`` inputs require them all the same.

    Raises:
        CandidateError: An output of ``upstream`` is missing, of another shape, or carries no gradient; or an input
            requires a gradient that did not before.
    """
    leaves = tensors_like(inputs, differentiable)
    outputs = named_outputs(function(**leaves))
    for name, leaf in leaves.items():
        if name not in differentiable and isinstance(leaf, Tensor) and leaf.requires_grad:
            raise CandidateError(f"made {name!r} require a gradient, which nobody had asked for")
    detached = {name: None if t is None else t.detach() for name, t in outputs.items()}
    carrying = tuple(name for name, t in outputs.items() if t is not None and t.requires_grad)
    if not upstream:
        return Evaluation(detached, {}, carrying)
    roots, cotangents = [], []
    for name, cotangent in upstream.items():
        output = outputs.get(name)
        if output is None:
            raise CandidateError(
                f"returned no {name!r}: it returned {', '.join(k for k in outputs if outputs[k] is not None)}"
            )
        if output.shape != cotangent.shape:
            raise CandidateError(
                f"{name!r} has shape {tuple(output.shape)}: the reference's is {tuple(cotangent.shape)}"
            )
        if not output.requires_grad:
            raise CandidateError(
                f"{name!r} carries no gradient, although the reference's does: it was detached on the way"
            )
        roots.append(output)
        cotangents.append(cotangent.to(output.dtype))
    gradients = torch.autograd.grad(
        roots, [leaves[name] for name in differentiable], grad_outputs=cotangents, allow_unused=True
    )
    # Detached: a backward may hand out a tensor it has saved, which may require gradients itself.
    named = {k: None if g is None else g.detach() for k, g in zip(differentiable, gradients, strict=True)}
    return Evaluation(detached, named, carrying)
