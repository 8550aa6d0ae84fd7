"""The Triton path's loss and metrics against the reference in float64 on the very values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.kernels import FusedLinearKTOLoss, ReferenceKTOLoss
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import METRICS
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.contract.reference import reference_kto_loss
from ktonum.kernels.device import trace
from ktonum.kernels.loss import KernelOptions, fused_linear_kto_loss
from support.combinations import combinations
from support.kto_gradients import Work
from support.kto_inputs import (
    DIFFERENTIABLE,
    DIMS,
    DTYPES,
    Recipe,
    draw,
    kernel_outcome,
    mapped,
    oracle_outcome,
    tracked,
)
from support.kto_rounding import objections, spreads

#: Every parameter away from its default, alone and together.
CONFIGS = [
    {},
    {"beta": 0.37, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    {"loss_type": "apo_zero_unpaired"},
    {"loss_type": "apo_zero_unpaired", "beta": 0.5, "undesirable_weight": 2.0, "reduction": "sum"},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"average_log_prob": True, "beta": 2.0},
    {"average_log_prob": True, "reduction": "none", "desirable_weight": 0.0},
    {"average_log_prob": True, "reduction": "sum", "beta": -0.2},
]
REFERENCES = ["none", "model", "other model", "logps"]
KLS = ["none", "scalar", "(1,)", "(B,)", "sequences"]


def hold_forward(inputs: KTOInputs, config: KTOConfig, options: KernelOptions | None = None) -> Tensor:
    """Loss and metrics of the kernels are the oracle's within rounding."""
    actual = kernel_outcome(inputs, config, names=(), options=options)
    expected = oracle_outcome(inputs, config, names=())
    spread = spreads(inputs, config)
    wide = torch.float64 if inputs.input.dtype == torch.float64 else torch.float32
    assert actual.loss.dtype == wide
    assert {m.dtype for m in actual.metrics} == {wide}
    assert not objections(actual.loss, expected.loss, spread["loss"])
    assert len(actual.metrics) == len(METRICS)
    for name, found, wanted, s in zip(METRICS, actual.metrics, expected.metrics, spread["metrics"], strict=True):
        assert not (problems := objections(found, wanted, s)), (name, problems)
    return actual.loss


@combinations("dims, dtype", DIMS, DTYPES, ids=str)
def test_every_size(dims: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    hold_forward(draw(Recipe(dims=dims, dtype=dtype, reference="model", kl="scalar"), device), KTOConfig())


@combinations("dtype, kl, reference", [torch.float64, torch.bfloat16], KLS, REFERENCES, ids=str)
def test_every_reference_and_kl(reference: str, kl: str, dtype: torch.dtype, device: torch.device) -> None:
    bias = kl != "(1,)"
    recipe = Recipe(dims=(4, 3, 19, 41), dtype=dtype, reference=reference, kl=kl, bias=bias, seed=1)
    hold_forward(draw(recipe, device), KTOConfig(beta=0.3))


@combinations("dtype, parameters", [torch.float64, torch.float32, torch.float16], CONFIGS, ids=str)
def test_every_parameter(parameters: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    kl = "none" if parameters.get("loss_type") == "apo_zero_unpaired" else "sequences"
    inputs = draw(Recipe(dims=(4, 6, 19, 41), dtype=dtype, reference="model", kl=kl, seed=2), device)
    hold_forward(inputs, KTOConfig(**parameters))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_all_masked_sequence(average: bool, reduction: Any, device: torch.device) -> None:
    """It counts with log-probability 0 in a sum over tokens, and has no average."""
    inputs = draw(Recipe(dims=(4, 5, 19, 41), reference="model"), device)
    inputs.target[2] = -100
    config = KTOConfig(average_log_prob=average, reduction=reduction)
    loss = hold_forward(inputs, config)
    assert bool(loss.isnan().any()) == (average and reduction == "none")


@combinations("desirable, average", [False, True], [False, True])
def test_a_batch_of_one_label(desirable: bool, average: bool, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(3, 5, 19, 41), reference="model", kl="(B,)"), device)
    inputs.preference_labels.fill_(desirable)
    hold_forward(inputs, KTOConfig(average_log_prob=average))
    absent = kernel_outcome(inputs, KTOConfig(), names=()).metrics[int(desirable) :: 2]
    assert [float(m) for m in absent] == [0.0, 0.0, 0.0]


def test_everything_masked(device: torch.device) -> None:
    """Valid without averaging: every log-ratio is 0."""
    inputs = draw(Recipe(masked=1.0, dtype=torch.float32), device)
    assert float(hold_forward(inputs, KTOConfig())) == 0.5


def test_another_ignore_index_inside_the_vocabulary(device: torch.device) -> None:
    inputs = draw(Recipe(dims=(3, 30, 7, 11), masked=0.0), device)
    assert bool((inputs.target == 3).any())
    hold_forward(inputs, KTOConfig(ignore_index=3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_integer_dtype_of_targets(dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(2, 9, 7, 11), masked=0.0), device)
    expected = kernel_outcome(inputs, KTOConfig(ignore_index=5), names=())
    inputs = mapped(inputs, lambda t: t.to(dtype) if t.dtype == torch.int64 else t)
    assert torch.equal(kernel_outcome(inputs, KTOConfig(ignore_index=5), names=()).loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    """Probabilities down to e**-100s: nothing overflows, and the log-probabilities keep their relative precision."""
    inputs = draw(Recipe(dims=(2, 8, 16, 300), dtype=dtype, reference="model"), device)
    with torch.no_grad():
        inputs.input.mul_(64.0)
    hold_forward(inputs, KTOConfig(beta=0.01))


def test_the_module_and_the_function_agree(device: torch.device) -> None:
    inputs = draw(Recipe(reference="model", kl="sequences"), device)
    module = FusedLinearKTOLoss(beta=0.3, use_ref_model=True, desirable_weight=1.5, reduction="sum")
    tensors = inputs.tensors()
    positional = [tensors.pop(n) for n in ("input", "weight", "target", "bias", "preference_labels")]
    loss, metrics = module(*positional, **tensors)
    reference = ReferenceKTOLoss(beta=0.3, use_ref_model=True, desirable_weight=1.5, reduction="sum")
    expected, _ = reference(*positional, **tensors)
    config = KTOConfig(beta=0.3, desirable_weight=1.5, reduction="sum")
    direct = kernel_outcome(inputs, config, names=())
    assert torch.equal(loss, direct.loss)
    assert all(map(torch.equal, metrics, direct.metrics))
    assert not objections(loss, expected, spreads(inputs, config)["loss"])


def test_ligers_own_arguments_change_nothing(device: torch.device) -> None:
    inputs = draw(Recipe(), device)
    arguments = (inputs.input, inputs.weight, inputs.target, inputs.bias, inputs.preference_labels)
    plain, _ = FusedLinearKTOLoss()(*arguments)
    other, _ = FusedLinearKTOLoss(compiled=False, chunk_size=7)(*arguments)
    assert torch.equal(plain, other)


#: Launched in a backward alone.
BACKWARD = {"row_coefficients_kernel", "input_product", "weight_product", "bias_gradient_kernel"}


def test_no_gradients_are_computed_in_a_forward(device: torch.device) -> None:
    """What it may keep for them is in test_kernels_slabs.py."""
    inputs = tracked(draw(Recipe(), device))
    with trace.recorded() as launches:
        with torch.no_grad():
            loss, metrics = fused_linear_kto_loss(inputs, KTOConfig())
        assert not loss.requires_grad
        for workspace in (2**20, 1):
            loss, metrics = fused_linear_kto_loss(inputs, KTOConfig(), KernelOptions(workspace=workspace))
            assert loss.requires_grad
            assert not any(m.requires_grad for m in metrics)
    assert not BACKWARD & {launch.name for launch in launches}
    assert not Work(launches).computed_again
    with trace.recorded() as launches:
        loss.backward()  # type: ignore[no-untyped-call]
    assert BACKWARD <= {launch.name for launch in launches}
    assert Work(launches).computed_again


def test_masked_tokens_cost_no_forward_work(device: torch.device) -> None:
    inputs = draw(Recipe(dims=(4, 10, 7, 11), reference="model", kl="sequences", masked=0.5), device)
    with trace.recorded() as launches:
        kernel_outcome(inputs, KTOConfig(), names=())
    unmasked = int((inputs.target != -100).sum())
    kl_unmasked = int((inputs.kl_target != -100).sum())  # type: ignore[union-attr, operator]
    assert 0 < unmasked < 40
    for name in ("target_logits_kernel", "logits_product", "softmax_kernel"):
        assert sorted(Work(launches).rows(name)) == sorted([unmasked] * 2 + [kl_unmasked] * 2), name


def test_what_masked_tokens_hold_does_not_matter(device: torch.device) -> None:
    """Not a NaN's worth, either, apart from the metric that sums the logits of masked tokens too."""
    inputs = draw(Recipe(masked=0.5, dtype=torch.float32), device)
    before = kernel_outcome(inputs, KTOConfig())
    masked = inputs.target == -100
    with torch.no_grad():
        inputs.input[masked] = 1e4
    after = kernel_outcome(inputs, KTOConfig())
    assert torch.equal(before.loss, after.loss)
    for name in DIFFERENTIABLE:
        assert torch.equal(before.gradients[name], after.gradients[name])


# The backward's test runs float32 and float16 by default: of each pair of dtypes that the same kernels serve, one.
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=() if dtype in (torch.float64, torch.bfloat16) else pytest.mark.exhaustive)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_twice_is_bitwise_the_same(dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(Recipe(dims=(2, 70, 9, 300), dtype=dtype, kl="sequences"), device)
    first, second = (kernel_outcome(inputs, KTOConfig(), names=()) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(map(torch.equal, first.metrics, second.metrics))


def flagged(actual: Tensor, expected: Tensor, spread: Tensor) -> bool:
    return bool(objections(actual, expected, spread))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_flags_planted_faults(dtype: torch.dtype, device: torch.device) -> None:
    inputs, config = draw(Recipe(dtype=dtype, reference="model", kl="scalar"), device), KTOConfig()
    actual, expected, spread = kernel_outcome(inputs, config), oracle_outcome(inputs, config), spreads(inputs, config)
    # 30 times the loss' own rounding; the loss of 16-bit inputs is as precise as that of float32.
    fault = 1e-13 if dtype == torch.float64 else 1e-5
    assert flagged(actual.loss * (1 + fault), expected.loss, spread["loss"])
    for value, wanted, s in zip(actual.metrics, expected.metrics, spread["metrics"], strict=True):
        assert flagged(value * (1 + 20 * fault), wanted, s)
    assert flagged(torch.full_like(actual.loss, torch.nan), expected.loss, spread["loss"])
    assert flagged(actual.loss[None], expected.loss, spread["loss"])


def test_the_wrong_ops_are_told_apart(device: torch.device) -> None:
    """A loss that rounds logits to the inputs' dtype, as published ones do, is not within the kernels' bound."""
    inputs, config = draw(Recipe(dims=(3, 40, 64, 127), dtype=torch.bfloat16, reference="model"), device), KTOConfig()
    rounding, _ = reference_kto_loss(inputs, config)
    assert flagged(rounding, oracle_outcome(inputs, config, names=()).loss, spreads(inputs, config)["loss"])
