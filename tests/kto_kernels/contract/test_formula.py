"""The KTO formula against the papers' equations, written out here once more in 400-digit arithmetic."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import kl_estimate, kto_losses, reduce_losses, sequence_means, split_sums

UNIT_ROUNDOFF = 2.0**-53

# Log-probabilities of completions of a few to a thousand tokens; the ratios reach from near 0 to where 1 - sigmoid
# loses every digit in float64, and almost underflows.
LOGPS = [-0.3, -12.75, -512.3, -1596.9, -3.1, -800.0]
REFERENCE_LOGPS = [-0.31, -17.0, -1100.7, -1450.2, -2.0, -410.5]
# The papers' 1 - sigmoid cancels down to 1e-264 there: enough digits for that and for float64.
DIGITS = 400


def logistic(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def loss_of_the_paper(
    config: KTOConfig, desirable: bool, logp: mpmath.mpf, reference: mpmath.mpf, z0: mpmath.mpf
) -> mpmath.mpf:
    """One sequence's loss: KTO's eq. 7, lambda_y - v(x, y), or APO-zero's two halves."""
    beta, reward = mpmath.mpf(config.beta), logp - reference
    weight = mpmath.mpf(config.desirable_weight if desirable else config.undesirable_weight)
    if config.loss_type == "kto":
        value = weight * logistic(beta * (reward - z0) if desirable else beta * (z0 - reward))
        return weight - value
    return weight * (1 - logistic(beta * reward)) if desirable else weight * logistic(beta * reward)


def margin_error(config: KTOConfig, ratio: mpmath.mpf, z0: mpmath.mpf) -> float:
    """Rounding of beta * ((logp - reference) - z0) in float64: one unit roundoff for each of the three operations."""
    used = z0 if config.loss_type == "kto" else 0
    return float(UNIT_ROUNDOFF * abs(config.beta) * (abs(ratio) + 2 * abs(ratio - used)))


def kl_of_form(form: str) -> Tensor | None:
    values = {
        "none": None,
        "scalar": torch.tensor(1.3, dtype=torch.float64),
        "(1,)": torch.tensor([-0.7], dtype=torch.float64),
        "(B,)": torch.tensor([0.0, 0.1, 2.5, -1.5, 40.0, 3.3], dtype=torch.float64),
    }
    return values[form]


@pytest.mark.parametrize("form", ["none", "scalar", "(1,)", "(B,)"])
@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize(("beta", "desirable_weight", "undesirable_weight"), [(0.1, 1.0, 1.0), (0.37, 1.3, 0.7)])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_losses_and_gradients_are_those_of_the_papers(
    loss_type: str, beta: float, desirable_weight: float, undesirable_weight: float, reference_free: bool, form: str
) -> None:
    config = KTOConfig(
        loss_type=loss_type,  # type: ignore[arg-type]
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    kl = kl_of_form(form)
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    reference = None if reference_free else torch.tensor(REFERENCE_LOGPS, dtype=torch.float64)
    per_sequence = torch.zeros(len(LOGPS), dtype=torch.float64) if kl is None else kl.expand(len(LOGPS))
    for desirable in (True, False):
        labels = torch.full((len(LOGPS),), desirable)
        losses = kto_losses(logps, reference, labels, kl, config)
        (gradients,) = torch.autograd.grad(losses.sum(), logps)
        assert losses.dtype == torch.float64
        with mpmath.workdps(DIGITS):
            for i, logp in enumerate(LOGPS):
                start = mpmath.mpf(0 if reference_free else REFERENCE_LOGPS[i])
                z0 = mpmath.mpf(per_sequence[i].item())

                def paper(x: mpmath.mpf, start: mpmath.mpf = start, z0: mpmath.mpf = z0) -> mpmath.mpf:
                    return loss_of_the_paper(config, desirable, x, start, z0)  # noqa: B023 - called at once

                error = margin_error(config, mpmath.mpf(logp) - start, z0)
                expected, slope = paper(mpmath.mpf(logp)), mpmath.diff(paper, mpmath.mpf(logp))
                # A margin off by e moves sigmoid(-margin) by a factor of at most exp(e); sigmoid and the weight round.
                assert abs(losses[i].item() - expected) <= abs(expected) * (math.expm1(error) + 6 * UNIT_ROUNDOFF)
                scale = beta * (desirable_weight if desirable else undesirable_weight)
                assert abs(gradients[i].item() - slope) <= scale * (error + 4 * UNIT_ROUNDOFF)


def test_small_losses_do_not_cancel() -> None:
    logps = torch.tensor([600.0], dtype=torch.float64)
    loss = kto_losses(logps, None, torch.tensor([True]), None, KTOConfig(beta=0.1)).item()
    assert loss == pytest.approx(math.exp(-60), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_keep_the_dtype_of_the_log_probabilities(dtype: torch.dtype) -> None:
    logps = torch.tensor([-3.0, -4.0], dtype=dtype)
    losses = kto_losses(logps, logps + 1, torch.tensor([True, False]), None, KTOConfig(desirable_weight=1.3))
    assert losses.dtype == dtype


def test_weights_are_exact_in_float64() -> None:
    # At a ratio of 0 the loss is half the weight: a weight that passed through float32 shows.
    zero = torch.zeros(2, dtype=torch.float64)
    config = KTOConfig(desirable_weight=1.3, undesirable_weight=0.7)
    assert kto_losses(zero, None, torch.tensor([True, False]), None, config).tolist() == [1.3 / 2, 0.7 / 2]


def test_no_gradient_reaches_the_other_label() -> None:
    config = KTOConfig(undesirable_weight=0.0)
    logps = torch.tensor([-3.0, -4.0], dtype=torch.float64, requires_grad=True)
    kto_losses(logps, None, torch.tensor([True, False]), None, config).sum().backward()
    assert logps.grad is not None
    assert logps.grad[0] < 0 and logps.grad[1] == 0


def test_kl_estimate_is_the_clamped_mean_without_gradient() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -2.5, -4.5], dtype=torch.float64)
    estimate = kl_estimate(policy, reference)
    assert estimate.item() == 1.0 and not estimate.requires_grad and estimate.shape == ()
    assert kl_estimate(reference, policy).item() == 0.0


def test_a_sequence_without_tokens_has_no_average_and_no_gradient() -> None:
    sums = torch.tensor([-6.0, 0.0], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 0])
    means = sequence_means(sums, counts, KTOConfig(average_log_prob=True))
    assert means[0].item() == -2.0 and means[1].isnan()
    means.nansum().backward()
    assert sums.grad is not None and sums.grad.tolist() == [1 / 3, 0.0]
    assert sequence_means(sums, counts, KTOConfig()) is sums


def test_reductions() -> None:
    losses = torch.tensor([0.25, 0.5, math.nan], dtype=torch.float64)
    for average, reduction in itertools.product((True, False), ("mean", "sum", "none")):
        config = KTOConfig(average_log_prob=average, reduction=reduction)  # type: ignore[arg-type]
        given = losses if average else losses[:2]
        expected = {"mean": torch.tensor(0.375), "sum": torch.tensor(0.75), "none": given}[reduction]
        torch.testing.assert_close(reduce_losses(given, config), expected.double(), rtol=0, atol=0, equal_nan=True)
    # Without an average a NaN is an error in the inputs, and must not be dropped.
    assert reduce_losses(losses, KTOConfig()).isnan()


def test_split_sums_by_label_without_nan() -> None:
    values = torch.tensor([1.0, 2.0, math.nan, 8.0, math.nan])
    labels = torch.tensor([True, False, True, False, False])
    assert [s.item() for s in split_sums(values, labels)] == [1.0, 10.0]
    assert [s.item() for s in split_sums(values, torch.ones(5, dtype=torch.bool))] == [11.0, 0.0]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"loss_type": "bco"}, ["loss_type", "'bco'", "'kto'", "'apo_zero_unpaired'"]),
        ({"reduction": "avg"}, ["reduction", "'avg'", "'mean'", "'sum'", "'none'"]),
        ({"beta": math.nan}, ["beta", "nan", "finite"]),
        ({"beta": "0.1"}, ["beta", "'0.1'", "finite"]),
        ({"beta": True}, ["beta", "True", "finite"]),
        ({"desirable_weight": math.inf}, ["desirable_weight", "inf", "finite"]),
        ({"undesirable_weight": None}, ["undesirable_weight", "None", "finite"]),
        ({"ignore_index": -100.0}, ["ignore_index", "-100.0", "integer"]),
        ({"ignore_index": False}, ["ignore_index", "False", "integer"]),
    ],
)
def test_parameters_that_are_not_accepted(parameters: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        KTOConfig(**parameters)  # type: ignore[arg-type]
    assert [word for word in words if word not in str(raised.value)] == []
