"""Stored, recomputed and partly stored exponentials: one result, and no more kept than a gradient needs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.device import hardware
from ktonum.kernels.device.slabs import Slab
from ktonum.kernels.device.statistics import launch
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss
from support.combinations import combinations
from support.kto_gradients import PATHS, Work, hold_gradients, options_of
from support.kto_inputs import DIFFERENTIABLE, DTYPES, Recipe, draw, kernel_outcome, oracle_outcome, tracked
from support.kto_rounding import objections, spreads

#: Slabs that a backward computes for 513 to 768 classes, by path; the last depends on memory to spare.
COMPUTED = {"stored": 0, "recomputed": 3, "partly stored": 2}
#: Hidden size and dtype; of the dtypes, those of 16 bits alone come through descriptors.
OPERANDS = {
    f"{served}-{dtype}": (hidden, dtype)
    for dtype in DTYPES
    for served, hidden in (("pointers", 20), ("descriptors", 24))
}


@combinations("operands, path, vocabulary", OPERANDS, PATHS, [513, 768])
def test_many_slabs_are_one_slab(
    vocabulary: int, operands: tuple[int, torch.dtype], path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, dtype = operands
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


@combinations("tokens, hidden, dtype", [1, 5], [72, 77], DTYPES, ids=str)
def test_slabs_in_the_memory_of_the_gradient(
    tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens: slabs lie in rows of the weight's gradient that are still to be written, and fewer are enough."""
    inputs = draw(Recipe(dims=(2, tokens, hidden, 1300), dtype=dtype, masked=0.0), device)
    alone = options_of("recomputed", inputs, monkeypatch)
    work = Work(monkeypatch)
    hold_gradients(inputs, KTOConfig(), options=alone)
    if hardware.slab_dtype(dtype) == dtype:
        assert 0 < work.calls["exponentials"] < 6
    # Not where there is no such gradient.
    work.calls.clear()
    kernel_outcome(inputs, KTOConfig(), names=("input", "bias"), options=alone)
    assert work.calls["exponentials"] == 6


def test_what_fits_is_decided_by_unmasked_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(Recipe(dims=(2, 32, 24, 600), masked=0.75, dtype=torch.float32), device)
    options = options_of("partly stored", inputs, monkeypatch)
    work = Work(monkeypatch)
    hold_gradients(inputs, KTOConfig(), options=options)
    rows = int((inputs.target != -100).sum())
    assert rows * 640 <= 64 * 256 < 64 * 640
    assert work.stored == [(rows, 600)]
    assert not work.calls["exponentials"]


@combinations("hidden, path, dtype", {"pointers": 19, "descriptors": 24}, PATHS, DTYPES)
def test_a_retained_graph_gives_the_same_gradients(
    hidden: int, path: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward leaves what the forward stored as it was, whatever upstream gradient comes in between.

    More tokens than hidden units and then some: nothing is stored in the memory of the weight's gradient.
    """
    inputs = tracked(draw(Recipe(dims=(3, 57, hidden, 600), dtype=dtype, reference="model"), device))
    loss, _ = fused_linear_kto_loss(inputs, options=options_of(path, inputs, monkeypatch))
    leaves = [getattr(inputs, name) for name in DIFFERENTIABLE]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    other = torch.autograd.grad(loss, leaves, torch.full_like(loss, -3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, other))


@combinations(
    "tokens, masked, dtype", [5, 20, 40, 90], [0.0, 0.4], [d for d in DTYPES if hardware.slab_dtype(d) == d], ids=str
)
def test_exponentials_stored_in_the_memory_of_the_gradient(
    tokens: int, masked: float, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first backward uses them up, the second computes them again; each is right and spoils nothing."""
    inputs = tracked(draw(Recipe(dims=(2, tokens, 64, 1600), dtype=dtype, masked=masked, reference="model"), device))
    config, work = KTOConfig(), Work(monkeypatch)
    loss, _ = fused_linear_kto_loss(inputs, config, options_of("recomputed", inputs, monkeypatch))
    # 1,600 columns: the more tokens, the fewer of them fit.
    kept = sum(columns for _, columns in work.stored)
    assert 256 <= kept < 1600
    assert len({rows for rows, _ in work.stored}) == 1
    leaves = [getattr(inputs, name) for name in DIFFERENTIABLE]
    computed = []
    expected, spread = oracle_outcome(inputs, config), spreads(inputs, config)
    for retain in (True, True, False):
        work.calls.clear()
        gradients = torch.autograd.grad(loss, leaves, retain_graph=retain)
        computed.append(work.calls["exponentials"])
        for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
            assert not objections(gradient, expected.gradients[name], spread[name]), name
    assert computed[0] < computed[1] == computed[2]


def test_the_memory_of_the_gradient_becomes_the_gradient(device: torch.device) -> None:
    """No copy of a head's size: the forward made the memory that the caller gets."""
    inputs = tracked(draw(Recipe(dims=(2, 20, 64, 5000), dtype=torch.float32), device))
    loss, _ = fused_linear_kto_loss(inputs, options=KernelOptions(workspace=1))
    nodes = [loss.grad_fn]
    while not hasattr(nodes[0], "gradient"):
        nodes = [*nodes[1:], *(n for n, _ in nodes[0].next_functions if n is not None)]  # type: ignore[union-attr]
    memory = nodes[0].gradient.data_ptr()
    loss.backward()  # type: ignore[no-untyped-call]
    assert inputs.weight.grad is not None
    assert inputs.weight.grad.data_ptr() == memory


def test_nothing_is_stored_that_no_gradient_needs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    inputs = draw(Recipe(dims=(3, 9, 24, 40), reference="model", kl="sequences"), device)
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
        assert work.stored == [(int((inputs.target != -100).sum()), 40)] * count


def planted(fault: str, slab: Slab, target: Tensor, factor: Tensor) -> None:
    """Spoil a slab of exponentials as a wrong kernel would."""
    e, first = slab.exponentials, slab.first_column
    if fault == "the last row":
        e[-1] = 0.0
    elif fault == "the last column":
        e[:, -1] = e[:, -2]
    else:
        rows = ((target >= first) & (target < first + e.shape[1])).nonzero()[:, 0]
        e[rows, target[rows] - first] += (0.02 / factor[rows]).to(e.dtype)


@combinations("fault, path", ["the last row", "the last column", "the targets"], PATHS)
def test_planted_kernel_faults_are_flagged(
    fault: str, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistakes a kernel could make, rather than noise: even in bfloat16, the coarsest, they stand out."""
    inputs, config = draw(Recipe(dims=(4, 9, 37, 258), dtype=torch.bfloat16, reference="model"), device), KTOConfig()
    options = options_of(path, inputs, monkeypatch)
    factors: list[Tensor] = []

    scored, computed = launch.row_statistics, launch.exponentials

    def spoiled_forward(
        projection: launch.Projection, statistics: launch.RowStatistics, *, slabs: Sequence[Slab]
    ) -> None:
        scored(projection, statistics, slabs=slabs)
        # The policy's pass is the last one before the backward.
        factors.append(statistics.factor)
        for slab in slabs:
            planted(fault, slab, projection.target, factors[-1])

    def spoiled_backward(projection: launch.Projection, shift: Tensor, *, slab: Slab) -> None:
        computed(projection, shift, slab=slab)
        planted(fault, slab, projection.target, factors[-1])

    monkeypatch.setattr(launch, "row_statistics", spoiled_forward)
    monkeypatch.setattr(launch, "exponentials", spoiled_backward)
    found, expected, spread = (
        kernel_outcome(inputs, config, options=options),
        oracle_outcome(inputs, config),
        spreads(inputs, config),
    )
    assert objections(found.gradients["weight"], expected.gradients["weight"], spread["weight"])


def test_float16_is_rounded_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile's exponentials are relative to its maximum first; what brings them to their row's rounds nothing again.

    Where all tokens have the same logits both roundings would be the same for all, and average out in no gradient.
    """
    inputs = draw(Recipe(dims=(3, 21, 70, 600), dtype=torch.float16, masked=0.0), device)
    genuine, errors = launch.row_statistics, []

    def compared(projection: launch.Projection, statistics: launch.RowStatistics, *, slabs: Sequence[Slab]) -> None:
        genuine(projection, statistics, slabs=slabs)
        x, w, bias = projection.input, projection.weight, projection.bias
        assert bias is not None
        probabilities = torch.nn.functional.linear(x.double(), w.double(), bias.double()).softmax(1)
        found = slabs[0].exponentials.double() * statistics.factor[:, None]
        error = (found / probabilities - 1).abs().scatter(1, projection.target[:, None], 0.0)
        errors.append(float(error.max()) / 2.0**-11)

    monkeypatch.setattr(launch, "row_statistics", compared)
    fused_linear_kto_loss(tracked(inputs), KTOConfig())
    # Beside half a unit in the last place, what float32 leaves of logits of order one.
    assert len(errors) == 1 and 0.9 < errors[0] < 1.01
