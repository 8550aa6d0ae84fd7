"""The Triton path's gradients against the reference in float64 on the very values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device import hardware, trace
from ktonum.kernels.device.slabs import Workspace
from ktonum.kernels.loss import FusedLinearKTOLoss, fused_linear_kto_loss
from ktonum.kernels.step.forward_passes import ScoringOptions
from ktonum.kernels.step.operators import FORWARD, ForwardArguments
from support.combinations import combinations
from support.kto_gradients import PATHS, Work, hold_gradients, options_of
from support.kto_inputs import (
    DIFFERENTIABLE,
    DIMS,
    DTYPES,
    Recipe,
    draw,
    given_names,
    kernel_outcome,
    mapped,
    oracle_outcome,
    tracked,
)
from support.kto_rounding import objections, spreads


@combinations("dims, dtype", DIMS, DTYPES, ids=str)
def test_every_size(dims: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    hold_gradients(draw(Recipe(dims=dims, dtype=dtype, reference="model", kl="scalar"), device), KTOConfig())


PARAMETERS = [
    {"beta": 0.37, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    {"loss_type": "apo_zero_unpaired", "beta": 0.5, "undesirable_weight": 2.0},
    {"reduction": "sum", "beta": -0.2},
    {"reduction": "none"},
    {"average_log_prob": True, "beta": 2.0},
    {"average_log_prob": True, "reduction": "none", "desirable_weight": 0.0},
]


@combinations("parameters, dtype", PARAMETERS, DTYPES, ids=str)
def test_every_parameter(parameters: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    kl = "none" if "loss_type" in parameters else "sequences"
    bias = "reduction" not in parameters
    inputs = draw(Recipe(dims=(4, 6, 19, 41), dtype=dtype, reference="model", kl=kl, bias=bias, seed=2), device)
    hold_gradients(inputs, KTOConfig(**parameters))


@combinations("reference, kl", ["none", "other model", "logps"], ["none", "(B,)", "sequences"])
def test_every_reference_and_kl(reference: str, kl: str, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(4, 3, 19, 41), dtype=torch.float32, reference=reference, kl=kl, seed=1), device)
    hold_gradients(inputs, KTOConfig(beta=0.3))


@combinations("upstream, dtype", [-1.0, 3.7, 1e-3, 128.0], DTYPES, ids=str)
def test_an_upstream_gradient_that_is_not_one(upstream: float, dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dtype=dtype, reference="model"), device)
    hold_gradients(inputs, KTOConfig(), torch.tensor(upstream, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upstream_gradient_that_is_not_uniform(dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(4, 5, 19, 41), dtype=dtype, reference="model"), device)
    upstream = torch.tensor([0.5, 0.0, -2.0, 3.0], device=device)
    actual = hold_gradients(inputs, KTOConfig(reduction="none"), upstream)
    assert not bool(actual.gradients["input"][1].any()), "a sequence whose loss does not count has no gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upstream_gradient_of_zero(dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dtype=dtype), device)
    actual = kernel_outcome(inputs, KTOConfig(), upstream=torch.tensor(0.0, device=device))
    assert not any(bool(g.any()) for g in actual.gradients.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_all_masked_sequence_without_an_average_has_no_gradient(reduction: Any, device: torch.device) -> None:
    """Its loss is NaN, or left out of the mean; either way no gradient is NaN."""
    inputs = draw(Recipe(dims=(4, 5, 19, 41), reference="model"), device)
    inputs.target[2] = -100
    actual = hold_gradients(inputs, KTOConfig(average_log_prob=True, reduction=reduction))
    assert all(bool(g.isfinite().all()) for g in actual.gradients.values())
    assert not bool(actual.gradients["input"][2].any())


def test_everything_masked(device: torch.device) -> None:
    actual = kernel_outcome(draw(Recipe(masked=1.0), device), KTOConfig())
    assert not any(bool(g.any()) for g in actual.gradients.values())


def test_masked_tokens_have_exactly_no_gradient(device: torch.device) -> None:
    inputs = draw(Recipe(masked=0.5, dtype=torch.bfloat16), device)
    gradient = kernel_outcome(inputs, KTOConfig()).gradients["input"]
    masked = inputs.target == -100
    assert not bool(gradient[masked].any())
    assert bool(gradient[~masked].any(-1).all())


@pytest.mark.parametrize("desirable", [False, True])
def test_a_batch_of_one_label(desirable: bool, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(3, 5, 19, 41), dtype=torch.float32, reference="model", kl="scalar"), device)
    inputs.preference_labels.fill_(desirable)
    hold_gradients(inputs, KTOConfig(undesirable_weight=1.5))


@combinations("token, dtype", [0, 6, 10], DTYPES, ids=str)
def test_many_tokens_of_one_target(token: int, dtype: torch.dtype, device: torch.device) -> None:
    """A row of the weight whose gradient many tokens add to, beside rows that are nobody's target."""
    inputs = draw(Recipe(dims=(2, 110, 257, 11), dtype=dtype), device)
    inputs.target[inputs.target != -100] = token
    hold_gradients(inputs, KTOConfig())


SUBSETS = {"+".join(names) or "nothing": names for n in range(4) for names in itertools.combinations(DIFFERENTIABLE, n)}
#: Hidden size and dtype, by what serves them.
OPERANDS = {"pointers": (19, torch.float16), "descriptors": (24, torch.float16), "float32": (24, torch.float32)}


@combinations("operands, names, path", OPERANDS, SUBSETS, PATHS[:2])
def test_only_what_is_asked_for_is_computed(
    operands: tuple[int, torch.dtype], names: tuple[str, ...], path: str, device: torch.device
) -> None:
    hidden, dtype = operands
    inputs = draw(Recipe(dims=(3, 6, hidden, 41), dtype=dtype, kl="sequences"), device)
    options = options_of(path, inputs)
    everything = kernel_outcome(inputs, KTOConfig(), options=options).gradients
    with trace.recorded() as launches:
        found = kernel_outcome(inputs, KTOConfig(), names=names, options=options).gradients
    work = Work(launches)
    assert found.keys() == set(names)
    assert all(torch.equal(g, everything[n]) for n, g in found.items())
    assert work.count("input_product") == work.count("finish_input_gradient_kernel") == ("input" in names)
    able = hardware.INTERPRETED or hardware.capability(device)[0] == 9
    fused = able and hidden == 24 and dtype == torch.float16
    assert work.count("weight_gradient_kernel") == ("weight" in names and fused)
    assert work.count("weight_product") == work.count("add_target_terms_kernel") == ("weight" in names and not fused)
    assert work.count("bias_gradient_kernel") == ("bias" in names)
    assert work.computed_again == (bool(names) and path == "recomputed")
    assert len(work.stored) == (bool(names) and path == "stored")


def test_the_reference_and_kl_tensors_get_no_gradient(device: torch.device) -> None:
    for reference in ("model", "logps"):
        inputs = draw(Recipe(reference=reference, kl="sequences"), device)
        floating = [n for n in given_names(inputs) if getattr(inputs, n).is_floating_point()]
        inputs = tracked(inputs, floating)
        loss, _ = fused_linear_kto_loss(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        assert {n for n in floating if getattr(inputs, n).grad is not None} == set(DIFFERENTIABLE)


@pytest.mark.parametrize("path", PATHS)
def test_masked_tokens_cost_no_backward_work(path: str, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(4, 10, 7, 600), masked=0.5), device)
    options = options_of(path, inputs)
    with trace.recorded() as launches:
        kernel_outcome(inputs, KTOConfig(), options=options)
    work, unmasked = Work(launches), int((inputs.target != -100).sum())
    assert {launch.dims["rows"] for launch in work.logits} == {unmasked}
    for name in ("input_product", "finish_input_gradient_kernel", "weight_product", "bias_gradient_kernel"):
        assert set(work.rows(name)) == {unmasked}, name


# The forward's test runs float64 and bfloat16 by default: of each pair of dtypes that the same kernels serve, one.
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=() if dtype in (torch.float32, torch.float16) else pytest.mark.exhaustive)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_twice_is_bitwise_the_same(dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(2, 70, 9, 300), dtype=dtype, kl="sequences"), device)
    first, second = (kernel_outcome(inputs, KTOConfig()).gradients for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in DIFFERENTIABLE)


def test_inputs_are_left_unmodified(device: torch.device) -> None:
    inputs = tracked(draw(Recipe(dtype=torch.float16, reference="model", kl="sequences"), device))
    before = mapped(inputs, lambda t: t.detach().clone()).tensors()
    versions = {n: t._version for n, t in inputs.tensors().items()}
    loss, _ = fused_linear_kto_loss(inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor.detach(), before[name])
        assert tensor._version == versions[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)], ids=str)
def test_autocast_is_an_explicit_cast(dtype: torch.dtype, device: torch.device) -> None:
    leaves = tracked(draw(Recipe(dtype=torch.float32, reference="model", kl="sequences"), device))
    with torch.autocast(device.type, dtype):
        loss, _ = fused_linear_kto_loss(leaves)
    found = torch.autograd.grad(loss, [getattr(leaves, n) for n in DIFFERENTIABLE])
    low = mapped(leaves, lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    expected = kernel_outcome(low, KTOConfig())
    assert torch.equal(loss, expected.loss)
    for gradient, name in zip(found, DIFFERENTIABLE, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected.gradients[name].float()), name


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    inputs = draw(Recipe(reference="model"), device)
    expected = kernel_outcome(inputs, KTOConfig())
    with torch.autocast(device.type, torch.bfloat16):
        actual = kernel_outcome(inputs, KTOConfig())
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(actual.gradients[n], expected.gradients[n]) for n in DIFFERENTIABLE)


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, marks=pytest.mark.exhaustive),
        {"reduction": "none", "average_log_prob": True, "loss_type": "kto"},
    ],
    ids=str,
)
def test_compiled_in_one_graph(parameters: dict[str, Any], device: torch.device) -> None:
    inputs = draw(Recipe(dtype=torch.float32, reference="model", kl="sequences"), device)
    module = FusedLinearKTOLoss(use_ref_model=True, **parameters)

    def step(leaves: KTOInputs) -> Tensor:
        loss, metrics = module(
            leaves.input * 1.5,
            leaves.weight,
            leaves.target,
            leaves.bias,
            leaves.preference_labels,
            ref_input=leaves.ref_input,
            ref_weight=leaves.ref_weight,
            ref_bias=leaves.ref_bias,
            kl_input=leaves.kl_input,
            kl_target=leaves.kl_target,
            kl_ref_input=leaves.kl_ref_input,
        )
        return torch.cat([2.0 * loss.flatten(), torch.stack(metrics)])

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = tracked(inputs)
        value = function(leaves)
        gradients = torch.autograd.grad(value.sum(), [getattr(leaves, n) for n in DIFFERENTIABLE])
        results.append((value, *gradients))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


@combinations(
    "names, workspace",
    {"+".join(names): names for names in (("input",), ("weight", "bias"), DIFFERENTIABLE)},
    {"stored": 2**20, "recomputed": 1},
)
def test_the_custom_operators_are_registered_rightly(
    names: tuple[str, ...], workspace: int, device: torch.device
) -> None:
    """Schema, fake implementation, autograd and compilation of each operator agree with what it does."""
    inputs = tracked(draw(Recipe(dims=(2, 3, 7, 11), reference="model", kl="sequences"), device), names)
    options = ScoringOptions(
        ignore_index=-100, average=False, allow_tf32=False, validate=True, workspace=Workspace(workspace)
    )
    call = tuple(FORWARD.to_flat(ForwardArguments(inputs, options, store=True)))
    # `test_aot_dispatch_dynamic` would feed outputs that are not differentiable with gradients; compilation is above.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.ktonum.sequence_logps.default, call, test_utils=tests)


def test_a_second_derivative_is_refused_clearly(device: torch.device) -> None:
    inputs = tracked(draw(Recipe(), device))
    loss, _ = fused_linear_kto_loss(inputs)
    (gradient,) = torch.autograd.grad(loss, inputs.input, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative.*use.*ReferenceKTOLoss"):
        gradient.sum().backward()


#: The least relative error of a whole gradient that the comparison has to notice.
SCALE_FAULTS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@combinations("name, dtype", DIFFERENTIABLE, DTYPES, ids=str)
def test_the_comparison_flags_planted_faults(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(4, 9, 37, 127), dtype=dtype, reference="model", kl="scalar"), device)
    config = KTOConfig()
    right, expected, spread = (
        kernel_outcome(inputs, config).gradients[name].double(),
        oracle_outcome(inputs, config).gradients[name],
        spreads(inputs, config)[name],
    )
    fault = SCALE_FAULTS[dtype]
    assert not objections(right, expected, spread)
    assert objections(right * (1 + fault), expected, spread)
    assert objections(right * (1 - fault), expected, spread)
    assert objections(torch.zeros_like(right), expected, spread)
    assert objections(right[None], expected, spread)
    # One element off, by 20 times what all of them may be off, and one that was never written.
    at = int(right.flatten().abs().argmax())
    for wrong in (right.flatten()[at] * (1 + 20 * fault), torch.tensor(0.0), torch.tensor(torch.nan)):
        planted = right.flatten().clone()
        planted[at] = wrong
        assert objections(planted.view(right.shape), expected, spread)
