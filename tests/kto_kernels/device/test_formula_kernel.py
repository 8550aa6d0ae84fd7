"""The formula in one launch gives what the formula in PyTorch gives, its derivative included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import kto_losses, reduce_losses, split_sums
from ktonum.kernels.device.formula.launch import FormulaInputs
from ktonum.kernels.step.autograd import differentiable_formula
from support.combinations import combinations

#: Differences of a few unit roundoffs: both are chains of less than ten operations in float64.
RELATIVE = 20 * 2.0**-53


def drawn(batch: int, device: torch.device, *, reference: bool, kl: str, nan: bool = False) -> FormulaInputs:
    generator = torch.Generator().manual_seed(batch * 10 + len(kl))

    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device)

    policy = normal(batch, scale=30.0) - 100
    if nan:
        policy[:: max(2, batch // 3)] = torch.nan
    points = {
        "none": None,
        "scalar": normal(scale=3.0).abs(),
        "(1,)": normal(1, scale=3.0),
        "(B,)": normal(batch, scale=3.0),
    }
    return FormulaInputs(
        policy=policy,
        # Close enough for sigmoids in all their range, and some saturated.
        reference=policy.nan_to_num(-100.0) + normal(batch, scale=20.0) if reference else None,
        kl=points[kl],
        labels=torch.rand(batch, generator=generator).to(device) < 0.6,
        logit_sums=normal(batch, scale=1e4),
    )


def in_torch(inputs: FormulaInputs, config: KTOConfig) -> tuple[Tensor, Tensor]:
    losses = kto_losses(inputs.policy, inputs.reference, inputs.labels, inputs.kl, config)
    policy = inputs.policy.detach()
    rewards = config.beta * (policy if inputs.reference is None else policy - inputs.reference)
    metrics = split_sums(torch.stack((policy, inputs.logit_sums, rewards)), inputs.labels)
    return reduce_losses(losses, config), metrics.flatten()


def differences(inputs: FormulaInputs, config: KTOConfig, other: KTOConfig | None = None) -> list[float]:
    """Of loss, gradient and metrics, relative to the largest terms of each."""
    found = []
    for compute, used in (
        (in_torch, config),
        (lambda i, c: differentiable_formula(i, c, torch.float64), other or config),
    ):
        policy = inputs.policy.clone().requires_grad_()
        loss, metrics = compute(
            FormulaInputs(policy, inputs.reference, inputs.kl, inputs.labels, inputs.logit_sums), used
        )
        assert not metrics.requires_grad
        upstream = torch.linspace(0.5, -2.0, loss.numel(), dtype=torch.float64, device=loss.device).view(loss.shape)
        (gradient,) = torch.autograd.grad(loss, policy, upstream)
        found.append((loss.detach(), gradient, metrics))
    (loss, gradient, metrics), theirs = found[0], found[1]
    # A sequence without a log-probability gets no gradient in either way of writing; see `sequence_means`.
    gradient, theirs_gradient = gradient.nan_to_num(0.0), theirs[1]
    floor = torch.finfo(torch.float64).tiny
    assert torch.equal(loss.isnan(), theirs[0].isnan())

    def relative(actual: Tensor, expected: Tensor, size: Tensor) -> float:
        return float(((actual - expected).nan_to_num(0.0).abs() / size.nan_to_num(0.0).clamp(min=floor)).max())

    terms = [t.nan_to_num(0.0).abs().sum() for t in (inputs.policy, inputs.logit_sums)]
    sizes = torch.stack([terms[0], terms[0], terms[1], terms[1], terms[0], terms[0]])
    # A margin of β r errs by a few units of its own size, and e^−m with it.
    margin = 1 + (abs(config.beta) * (inputs.policy.abs() + 100)).nan_to_num(0.0).max()
    return [
        relative(theirs[0], loss, loss.abs() * margin),
        relative(theirs_gradient, gradient, gradient.abs() * margin),
        relative(theirs[2], metrics, sizes),
    ]


CONFIGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.37, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    {"beta": -0.2},
    {"beta": 0.0},
    {"loss_type": "apo_zero_unpaired", "beta": 0.5},
]


BATCHES = (1, 7, 128, 129, 300)
REDUCTIONS = ("mean", "sum", "none")
REFERENCES = {"with a reference": True, "without": False}
KLS = ("none", "scalar", "(1,)", "(B,)")


@combinations("batch, parameters, reduction, reference, kl", BATCHES, CONFIGS, REDUCTIONS, REFERENCES, KLS, strength=2)
def test_every_configuration(
    batch: int, parameters: dict[str, Any], reduction: str, reference: bool, kl: str, device: torch.device
) -> None:
    config = KTOConfig(**parameters, reduction=reduction)  # type: ignore[arg-type]
    inputs = drawn(batch, device, reference=reference, kl=kl)
    assert max(differences(inputs, config)) < RELATIVE


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sequences_without_a_log_probability(reduction: str, average: bool, device: torch.device) -> None:
    """With averages they take no part; without, NaN comes through, as it would in PyTorch."""
    config = KTOConfig(average_log_prob=average, reduction=reduction)  # type: ignore[arg-type]
    assert max(differences(drawn(9, device, reference=True, kl="scalar", nan=True), config)) < RELATIVE


@pytest.mark.parametrize(
    "fault", [{"beta": 0.1 * (1 + 1e-12)}, {"desirable_weight": 1 + 1e-13}, {"undesirable_weight": 0.99}]
)
def test_the_comparison_flags_planted_faults(fault: dict[str, float], device: torch.device) -> None:
    inputs = drawn(16, device, reference=True, kl="scalar")
    assert max(differences(inputs, KTOConfig(), KTOConfig(**fault))) > RELATIVE  # type: ignore[arg-type]
