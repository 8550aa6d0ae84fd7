"""Stored, recomputed and partly stored exponentials: one result, and no more kept than a gradient needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.device import hardware, trace
from ktonum.kernels.device.packing.launch import Packing
from ktonum.kernels.device.slabs import Slab, SlabPlan, Workspace, row_stride
from ktonum.kernels.device.statistics import launch
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss
from ktonum.kernels.step.sequence_gradients import Wanted, sequence_gradients
from ktonum.kernels.step.sequences import Head, SequenceSums, Storage, projection, sequence_sums
from support.combinations import combinations
from support.kto_gradients import PATHS, Work, hold_gradients, options_of, policy_pass
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
    vocabulary: int, operands: tuple[int, torch.dtype], path: str, device: torch.device
) -> None:
    hidden, dtype = operands
    # More tokens than hidden units and then some: no slab fits into what is to be written of the weight's gradient.
    inputs = draw(Recipe(dims=(3, 57, hidden, vocabulary), dtype=dtype, reference="model"), device)
    options = options_of(path, inputs)
    with trace.recorded() as launches:
        hold_gradients(inputs, KTOConfig(), options=options)
    work = Work(launches)
    assert work.computed_again == COMPUTED[path]
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
    tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Few tokens: slabs lie in rows of the weight's gradient that are still to be written, and fewer are enough."""
    inputs = draw(Recipe(dims=(2, tokens, hidden, 1300), dtype=dtype, masked=0.0), device)
    alone = options_of("recomputed", inputs)
    with trace.recorded() as launches:
        hold_gradients(inputs, KTOConfig(), options=alone)
    if hardware.slab_dtype(dtype) == dtype:
        assert 0 < Work(launches).computed_again < 6
    # Not where there is no such gradient.
    with trace.recorded() as launches:
        kernel_outcome(inputs, KTOConfig(), names=("input", "bias"), options=alone)
    assert Work(launches).computed_again == 6


def test_what_fits_is_decided_by_unmasked_tokens(device: torch.device) -> None:
    inputs = draw(Recipe(dims=(2, 32, 24, 600), masked=0.75, dtype=torch.float32), device)
    options = options_of("partly stored", inputs)
    with trace.recorded() as launches:
        hold_gradients(inputs, KTOConfig(), options=options)
    work = Work(launches)
    rows = int((inputs.target != -100).sum())
    assert rows * 640 <= 64 * 256 < 64 * 640
    assert work.stored == [(rows, 600)]
    assert not work.computed_again


@combinations("hidden, path, dtype", {"pointers": 19, "descriptors": 24}, PATHS, DTYPES)
def test_a_retained_graph_gives_the_same_gradients(
    hidden: int, path: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A backward leaves what the forward stored as it was, whatever upstream gradient comes in between.

    More tokens than hidden units and then some: nothing is stored in the memory of the weight's gradient.
    """
    inputs = tracked(draw(Recipe(dims=(3, 57, hidden, 600), dtype=dtype, reference="model"), device))
    loss, _ = fused_linear_kto_loss(inputs, options=options_of(path, inputs))
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
    tokens: int, masked: float, dtype: torch.dtype, device: torch.device
) -> None:
    """The first backward uses them up, the second computes them again; each is right and spoils nothing."""
    inputs = tracked(draw(Recipe(dims=(2, tokens, 64, 1600), dtype=dtype, masked=masked, reference="model"), device))
    config = KTOConfig()
    with trace.recorded() as launches:
        loss, _ = fused_linear_kto_loss(inputs, config, options_of("recomputed", inputs))
    work = Work(launches)
    # 1,600 columns: the more tokens, the fewer of them fit.
    kept = sum(columns for _, columns in work.stored)
    assert 256 <= kept < 1600
    assert len({rows for rows, _ in work.stored}) == 1
    leaves = [getattr(inputs, name) for name in DIFFERENTIABLE]
    computed = []
    expected, spread = oracle_outcome(inputs, config), spreads(inputs, config)
    for retain in (True, True, False):
        with trace.recorded() as launches:
            gradients = torch.autograd.grad(loss, leaves, retain_graph=retain)
        computed.append(Work(launches).computed_again)
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


def test_nothing_is_stored_that_no_gradient_needs(device: torch.device) -> None:
    inputs = draw(Recipe(dims=(3, 9, 24, 40), reference="model", kl="sequences"), device)
    with trace.recorded() as launches:
        fused_linear_kto_loss(inputs)
        with torch.no_grad():
            fused_linear_kto_loss(tracked(inputs))
        reference = tracked(inputs, ("ref_input", "ref_weight", "ref_bias", "kl_input", "kl_ref_input"))
        fused_linear_kto_loss(reference)
    assert Work(launches).count("reduce_tiles_kernel") == 12
    assert Work(launches).stored == []
    # Of the four passes of a step the policy's alone is stored.
    for name in DIFFERENTIABLE:
        with trace.recorded() as launches:
            fused_linear_kto_loss(tracked(inputs, (name,)))
        assert Work(launches).stored == [(int((inputs.target != -100).sum()), 40)]


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


@dataclass(frozen=True)
class Stored:
    """A forward of the policy, all of whose exponentials are one slab."""

    sums: SequenceSums
    slab: Slab
    factor: Tensor


def stored_forward(head: Head, packing: Packing) -> Stored:
    size = packing.count * row_stride(len(head.weight))
    sums = sequence_sums(head, packing, Storage(size))
    (slab,) = SlabPlan.of(packing.count, len(head.weight), size).stored(sums.exponentials, None)
    return Stored(sums, slab, sums.statistics[3, : packing.count])


@combinations("fault, filled_by", ["the last row", "the last column", "the targets"], ["the forward", "the backward"])
def test_planted_kernel_faults_are_flagged(fault: str, filled_by: str, device: torch.device) -> None:
    """Mistakes a kernel could make, rather than noise: even in bfloat16, the coarsest, they stand out."""
    inputs, config = draw(Recipe(dims=(4, 9, 37, 258), dtype=torch.bfloat16, reference="model"), device), KTOConfig()
    policy = policy_pass(inputs, config)
    forward = stored_forward(policy.head, policy.packing)
    scored = projection(policy.head, policy.packing)
    if filled_by == "the backward":
        forward.slab.exponentials.fill_(torch.nan)
        launch.exponentials(scored, forward.sums.statistics[2, : policy.packing.count], slab=forward.slab)
    expected, spread = oracle_outcome(inputs, config).gradients["weight"], spreads(inputs, config)["weight"]

    def weight_gradient() -> Tensor:
        wanted = Wanted(input=False, weight=True, bias=False)
        _, found, _ = sequence_gradients(
            policy.head, policy.upstream, forward.sums, wanted=wanted, workspace=Workspace()
        )
        return found

    assert not objections(weight_gradient(), expected, spread)
    planted(fault, forward.slab, scored.target, forward.factor)
    assert objections(weight_gradient(), expected, spread)


def test_float16_is_rounded_once(device: torch.device) -> None:
    """A tile's exponentials are relative to its maximum first; what brings them to their row's rounds nothing again.

    Where all tokens have the same logits both roundings would be the same for all, and average out in no gradient.
    """
    inputs = draw(Recipe(dims=(3, 21, 70, 600), dtype=torch.float16, masked=0.0), device)
    policy = policy_pass(inputs, KTOConfig())
    forward = stored_forward(policy.head, policy.packing)
    assert inputs.bias is not None
    z = torch.nn.functional.linear(inputs.input.double(), inputs.weight.double(), inputs.bias.double())
    found = forward.slab.exponentials.double() * forward.factor[:, None]
    error = (found / z.flatten(0, 1).softmax(1) - 1).abs().scatter(1, inputs.target.view(-1, 1), 0.0)
    # Beside half a unit in the last place, what float32 leaves of logits of order one.
    assert 0.9 < float(error.max()) / 2.0**-11 < 1.01
