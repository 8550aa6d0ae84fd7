"""Inputs for tests of the KTO kernels, and running a loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.contract.reference import reference_kto_loss
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DIFFERENTIABLE = ("input", "weight", "bias")

#: (B, T, H, V): one of everything; around powers of two; around the interpreter's tiles, 128 rows by 256 columns by
#: 256 hidden; rows in two and three tiles; one class.
DIMS = [
    (1, 1, 1, 1),
    (2, 1, 16, 17),
    (1, 2, 15, 16),
    (3, 1, 1, 37),
    (1, 16, 17, 15),
    (3, 5, 37, 127),
    (2, 64, 16, 128),
    (1, 127, 15, 129),
    (3, 43, 17, 37),
    (2, 129, 5, 300),
    (2, 3, 255, 257),
    (2, 4, 256, 256),
    (2, 4, 257, 255),
    (3, 7, 20, 513),
    (4, 3, 20, 1),
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `draw` makes inputs; the defaults are those of a plain policy without a reference."""

    dims: tuple[int, int, int, int] = (3, 5, 37, 127)
    dtype: torch.dtype = torch.float64
    masked: float = 0.25
    bias: bool = True
    reference: str = "none"  # or "model", "other model" (another hidden size and dtype), "logps"
    kl: str = "none"  # or "scalar", "(1,)", "(B,)", "sequences"
    seed: int = 0


def draw(recipe: Recipe, device: torch.device) -> KTOInputs:
    """Inputs of the recipe. Logits are of order one, so that no probability is negligible and none dominates."""
    generator = torch.Generator().manual_seed(recipe.seed)
    batch, tokens, hidden, vocabulary = recipe.dims
    dtype = recipe.dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).to(device)

    def targets(rows: int) -> Tensor:
        ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
        return ids.masked_fill(torch.rand(rows, tokens, generator=generator) < recipe.masked, -100).to(device)

    head = 1.5 / hidden**0.5
    found: dict[str, Any] = {
        "input": normal(batch, tokens, hidden),
        "weight": normal(vocabulary, hidden, scale=head),
        "target": targets(batch),
        # Both labels wherever there are two sequences.
        "preference_labels": (torch.arange(batch) % 2 == recipe.seed % 2).to(device),
    }
    if recipe.bias:
        found["bias"] = normal(vocabulary)
    kl_rows = batch + 1  # nothing ties the KL sequences to the others
    other = recipe.reference == "other model"
    reference_hidden = hidden + 3 if other else hidden
    reference_dtype = (torch.float32 if dtype != torch.float32 else torch.bfloat16) if other else dtype
    if "model" in recipe.reference:
        found["ref_input"] = normal(batch, tokens, reference_hidden, dtype=reference_dtype)
        found["ref_weight"] = normal(vocabulary, reference_hidden, scale=head, dtype=reference_dtype)
        if recipe.bias:
            found["ref_bias"] = normal(vocabulary, dtype=reference_dtype)
    elif recipe.reference == "logps":
        found["ref_logps"] = normal(batch) - 3.0 * tokens
    if recipe.kl == "sequences":
        found["kl_input"] = normal(kl_rows, tokens, hidden)
        found["kl_target"] = targets(kl_rows)
        if "model" in recipe.reference:
            found["kl_ref_input"] = normal(kl_rows, tokens, reference_hidden, dtype=reference_dtype)
        elif recipe.reference == "logps":
            # Far enough below the policy's that the estimate is not clamped to 0.
            found["kl_ref_logps"] = normal(kl_rows) - 8.0 * tokens
    elif recipe.kl != "none":
        found["kl"] = {"scalar": normal(1)[0], "(1,)": normal(1), "(B,)": normal(batch)}[recipe.kl].abs()
    return KTOInputs(**found)


def mapped(inputs: KTOInputs, change: Any) -> KTOInputs:
    """``inputs`` with every tensor changed."""
    return replace(inputs, **{name: change(tensor) for name, tensor in inputs.tensors().items()})


def upcast(inputs: KTOInputs) -> KTOInputs:
    """The same values in float64. Each tensor is a new leaf."""
    return mapped(inputs, lambda t: (t.double() if t.is_floating_point() else t).detach().clone())


def tracked(inputs: KTOInputs, names: Sequence[str] = DIFFERENTIABLE) -> KTOInputs:
    """``inputs`` on new leaves, of which those in ``names`` require gradients."""
    leaves = mapped(inputs, lambda t: t.detach())
    for name in names:
        if (tensor := getattr(leaves, name)) is not None:
            tensor.requires_grad_()
    return leaves


@dataclass(frozen=True)
class Outcome:
    """A loss, its metrics, and the gradients that were asked for."""

    loss: Tensor
    metrics: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


def run_with(loss: Any, inputs: KTOInputs, config: KTOConfig, upstream: Tensor | None, names: Sequence[str]) -> Outcome:
    """Value and gradients of ``loss(inputs, config)``."""
    leaves = tracked(inputs, names)
    value, metrics = loss(leaves, config)
    names = [n for n in names if getattr(leaves, n) is not None]
    if not names:
        return Outcome(value, metrics, {})
    sent = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    found = torch.autograd.grad(value, [getattr(leaves, n) for n in names], sent)
    return Outcome(value.detach(), metrics, dict(zip(names, found, strict=True)))


def kernel_outcome(
    inputs: KTOInputs,
    config: KTOConfig,
    *,
    upstream: Tensor | None = None,
    names: Sequence[str] = DIFFERENTIABLE,
    options: KernelOptions | None = None,
) -> Outcome:
    """Value and gradients of the Triton kernels."""
    return run_with(lambda i, c: fused_linear_kto_loss(i, c, options), inputs, config, upstream, names)


def oracle_outcome(
    inputs: KTOInputs, config: KTOConfig, *, upstream: Tensor | None = None, names: Sequence[str] = DIFFERENTIABLE
) -> Outcome:
    """Value and gradients of the reference in float64, for the same values."""
    return run_with(reference_kto_loss, upcast(inputs), config, upstream, names)


def given_names(inputs: KTOInputs) -> list[str]:
    """The names of the tensors that are there."""
    return [f.name for f in fields(inputs) if getattr(inputs, f.name) is not None]
