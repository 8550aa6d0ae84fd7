"""The formula in one launch gives what the formula in PyTorch gives, its derivative included."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig, LossType, Reduction
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


#: Every parameter that the formula reads.
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "loss_type": get_args(LossType),
    "beta": (0.37, -0.2, 0.0),
    "desirable_weight": (1.0, 1.3),
    "undesirable_weight": (1.0, 0.7),
    "reduction": get_args(Reduction),
    "average_log_prob": (False, True),
}


def test_no_parameter_is_left_out() -> None:
    """But for the index of masked tokens, which log-probabilities of sequences no longer depend on."""
    assert PARAMETERS.keys() == {field.name for field in fields(KTOConfig)} - {"ignore_index"}


@combinations(
    ", ".join((*PARAMETERS, "reference", "kl")),
    *PARAMETERS.values(),
    (False, True),
    ("none", "scalar", "(1,)", "(B,)"),
    strength=2,
    ids=str,
)
def test_every_configuration(
    loss_type: LossType,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: Reduction,
    average_log_prob: bool,
    reference: bool,
    kl: str,
    device: torch.device,
) -> None:
    """Every pair of values of two parameters, and of a parameter and a form of the inputs."""
    config = KTOConfig(
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        reduction=reduction,
        average_log_prob=average_log_prob,
    )
    assert max(differences(drawn(300, device, reference=reference, kl=kl), config)) < RELATIVE


@pytest.mark.parametrize("batch", [1, 7, 128, 129, 300])
def test_every_size_of_a_batch(batch: int, device: torch.device) -> None:
    """A program takes 128 sequences at a time."""
    inputs = drawn(batch, device, reference=True, kl="(B,)")
    assert max(differences(inputs, KTOConfig(undesirable_weight=0.7))) < RELATIVE


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
