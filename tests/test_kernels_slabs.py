"""Stored, recomputed and partly stored exponentials: one result, and no more kept than a gradient needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kto_gradients import PATHS, Work, hold_gradients, options_of
from kto_inputs import DIFFERENTIABLE, DTYPES, Recipe, draw, kernel_outcome, oracle_outcome, tracked
from kto_rounding import objections, spreads
from torch import Tensor

from ktonum.kernels import hardware, launch
from ktonum.kernels.formula import KTOConfig
from ktonum.kernels.loss import fused_linear_kto_loss

#: Slabs that a forward fills and a backward computes for 600 classes, by path; the last depends on memory to spare.
COMPUTED = {"stored": 0, "recomputed": 3, "partly stored": 2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hidden", [20, 24], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("vocabulary", [513, 600, 768])
def test_many_slabs_are_one_slab(
    vocabulary: int, hidden: int, path: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More tokens than hidden units and then some: no slab fits into what is to be written of the weight's gradient.
    inputs = draw(Recipe(dims=(3, 57, hidden, vocabulary), dtype=dtype, reference="model"), device)
    options = options_of(path, inputs, monkeypatch)
    work = Work(monkeypatch)
    hold_gradients(inputs, KTOConfig(), options=options)
    assert work.calls["exponentials"] == COMPUTED[path]
    rows = int((inputs.target != -100).sum())
    assert (
        work.stored
        == {
            "stored": [(rows, vocabulary)],
            "recomputed": [],
            "partly stored": [(rows, 256)],
        }[path]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [64, 72, 77])
@pytest.mark.parametrize("tokens", [1, 5])
def test_slabs_in_the_memory_of_the_gradient(
    tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens: slabs lie in rows of the weight's gradient that are still to be written, and fewer are enough."""
    inputs = draw(Recipe(dims=(2, tokens, hidden, 2700), dtype=dtype, masked=0.0), device)
    alone = options_of("recomputed", inputs, monkeypatch)
    work = Work(monkeypatch)
    hold_gradients(inputs, KTOConfig(), options=alone)
    if hardware.slab_dtype(dtype) == dtype:
        assert 1 < work.calls["exponentials"] < 11
    # Not where there is no such gradient.
    work.calls.clear()
    kernel_outcome(inputs, KTOConfig(), names=("input", "bias"), options=alone)
    assert work.calls["exponentials"] == 11


def test_what_fits_is_decided_by_unmasked_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(Recipe(dims=(2, 32, 24, 600), masked=0.75, dtype=torch.float32), device)
    options = options_of("partly stored", inputs, monkeypatch)
    work = Work(monkeypatch)
    hold_gradients(inputs, KTOConfig(), options=options)
    rows = int((inputs.target != -100).sum())
    assert rows * 640 <= 64 * 256 < 64 * 640
    assert work.stored == [(rows, 600)]
    assert not work.calls["exponentials"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hidden", [19, 24], ids=["pointers", "descriptors"])
def test_a_retained_graph_gives_the_same_gradients(
    hidden: int, path: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward leaves what the forward stored as it was, whatever upstream gradient comes in between."""
    inputs = tracked(draw(Recipe(dims=(3, 9, hidden, 600), dtype=dtype, reference="model"), device))
    loss, _ = fused_linear_kto_loss(inputs, options=options_of(path, inputs, monkeypatch))
    leaves = [getattr(inputs, name) for name in DIFFERENTIABLE]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    other = torch.autograd.grad(loss, leaves, torch.full_like(loss, -3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, other))


def test_nothing_is_stored_that_no_gradient_needs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    inputs = draw(Recipe(dims=(3, 9, 24, 300), reference="model", kl="sequences"), device)
    fused_linear_kto_loss(inputs)
    with torch.no_grad():
        fused_linear_kto_loss(tracked(inputs))
    reference = tracked(inputs, ("ref_input", "ref_weight", "ref_bias", "kl_input", "kl_ref_input"))
    fused_linear_kto_loss(reference)
    assert work.calls["row_statistics"] == 12
    assert work.stored == []
    # Of the four passes of a step the policy's alone is stored.
    for count, name in enumerate(DIFFERENTIABLE, 1):
        fused_linear_kto_loss(tracked(inputs, (name,)))
        assert work.stored == [(int((inputs.target != -100).sum()), 300)] * count


def planted(fault: str, slab: Tensor, target: Tensor, factor: Tensor, first_column: int) -> None:
    """Spoil a slab of exponentials as a wrong kernel would."""
    if fault == "the last row":
        slab[-1] = 0.0
    elif fault == "the last column":
        slab[:, -1] = slab[:, -2]
    else:
        rows = ((target >= first_column) & (target < first_column + slab.shape[1])).nonzero()[:, 0]
        slab[rows, target[rows] - first_column] += (0.02 / factor[rows]).to(slab.dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["the last row", "the last column", "the targets"])
def test_planted_kernel_faults_are_flagged(
    fault: str, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistakes a kernel could make, rather than noise: even in bfloat16, the coarsest, they stand out."""
    inputs, config = draw(Recipe(dims=(4, 9, 37, 258), dtype=torch.bfloat16, reference="model"), device), KTOConfig()
    options = options_of(path, inputs, monkeypatch)
    factors: list[Tensor] = []

    def spoiled(genuine: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, slab: Tensor | None, first_column: int = 0, **named: Any) -> None:
            if genuine.__name__ == "row_statistics":
                genuine(*arguments, slab=slab, **named)
                # The policy's pass is the last one before the backward.
                factors.append(arguments[4].factor)
            else:
                genuine(*arguments, slab=slab, first_column=first_column, **named)
            if slab is not None:
                planted(fault, slab, arguments[3], factors[-1], first_column)

        return call

    for name in ("row_statistics", "exponentials"):
        monkeypatch.setattr(launch, name, spoiled(getattr(launch, name)))
    found, expected, spread = (
        kernel_outcome(inputs, config, options=options),
        oracle_outcome(inputs, config),
        spreads(inputs, config),
    )
    assert objections(found.gradients["weight"], expected.gradients["weight"], spread["weight"])
