"""Gradients where numbers leave the range of a dtype, or of what exponentials can be relative to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device import hardware
from ktonum.kernels.device.softmax.kernels import LARGEST_EXPONENT
from support.combinations import combinations
from support.kto_gradients import PATHS, hold_gradients, options_of, policy_pass
from support.kto_inputs import DIFFERENTIABLE, DTYPES, Recipe, draw, kernel_outcome, oracle_outcome
from support.kto_rounding import objections, spreads

# A log-ratio of hundreds times this is of order one: its sequence's coefficient is not negligible.
SMALL_BETA = KTOConfig(beta=1e-3)


def tiny_probabilities(device: torch.device) -> KTOInputs:
    """511 classes of probability 2.5e-8 each, whose gradients add up to 0.013: in float16 each would be 0."""
    vocabulary = 512
    weight = torch.zeros(vocabulary, 2, dtype=torch.float16, device=device)
    weight[1:, 0], weight[1:, 1] = -17.5, 1000.0
    return KTOInputs(
        input=torch.tensor([[[1.0, 0.0]]], dtype=torch.float16, device=device),
        weight=weight,
        target=torch.zeros(1, 1, dtype=torch.int64, device=device),
        preference_labels=torch.ones(1, dtype=torch.bool, device=device),
    )


def tiny_coefficients(device: torch.device) -> KTOInputs:
    """A loss whose share in each log-probability is 1e-7, where float16 has but one digit, on large hidden states."""
    inputs = draw(Recipe(dims=(2, 6, 16, 41), dtype=torch.float16, masked=0.0), device)
    with torch.no_grad():
        inputs.input.mul_(2.0**11)
        inputs.weight.mul_(2.0**-11)
    return inputs


def probabilities(inputs: KTOInputs) -> Tensor:
    """Of each token's vocabulary entries, 0 at its target: (B T, V), float64."""
    bias = None if inputs.bias is None else inputs.bias.double()
    z = torch.nn.functional.linear(inputs.input.double(), inputs.weight.double(), bias).flatten(0, 1)
    return z.softmax(1).scatter(1, inputs.target.view(-1, 1), 0.0)


@pytest.mark.parametrize("path", PATHS[:2])
def test_probabilities_that_float16_cannot_hold(path: str, device: torch.device) -> None:
    inputs, config = tiny_probabilities(device), KTOConfig(beta=4.0)
    options = options_of(path, inputs)
    actual = hold_gradients(inputs, config, options=options)
    assert 0.01 < abs(float(actual.gradients["input"][0, 0, 1])) < 0.02
    # And the comparison sees what is lost where they are stored as they are.
    expected, spread = oracle_outcome(inputs, config), spreads(inputs, config)
    p, weight = probabilities(inputs)[0], inputs.weight.double()
    coefficient = policy_pass(inputs, config).upstream[0]
    naive = expected.gradients["input"] + coefficient * (p - p.half().double()) @ weight
    assert objections(naive, expected.gradients["input"], spread["input"])


def test_coefficients_that_float16_cannot_hold(device: torch.device) -> None:
    inputs, config = tiny_coefficients(device), KTOConfig(beta=8e-7)
    hold_gradients(inputs, config)
    # And the comparison sees what is lost where hidden states are multiplied by them as they are, over the factor of
    # the exponentials.
    expected, spread = oracle_outcome(inputs, config), spreads(inputs, config)
    coefficients = policy_pass(inputs, config).upstream.repeat_interleave(inputs.target.shape[1])
    weighted = coefficients[:, None] * inputs.input.double().flatten(0, 1) / hardware.slab_scale(torch.float16)
    lost = (weighted - weighted.half().double()) * hardware.slab_scale(torch.float16)
    naive = expected.gradients["weight"] + probabilities(inputs).t() @ lost
    assert objections(naive, expected.gradients["weight"], spread["weight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_that_is_nearly_certain(dtype: torch.dtype, device: torch.device) -> None:
    """1 − p keeps its digits however small it is: no sum of 1 and of what is left of it is taken.

    One logit of 24 (11 in float16, whose gradients would underflow) beside 63 of zero: 1 − p is 2e-9 (1e-3).
    """
    inputs = draw(Recipe(dims=(2, 3, 8, 64), dtype=dtype, masked=0.0, bias=False), device)
    with torch.no_grad():
        inputs.input.fill_(1.0)
        inputs.weight.zero_()
        inputs.weight[5] = 1.375 if dtype == torch.float16 else 3.0
        inputs.target.fill_(5)
        inputs.preference_labels.fill_(True)  # else the weight's gradient cancels
    names, config = ("input", "weight"), KTOConfig(beta=4.0)
    found, expected = kernel_outcome(inputs, config, names=names), oracle_outcome(inputs, config, names=names)
    for name in names:
        error = (found.gradients[name].double() - expected.gradients[name]).norm() / expected.gradients[name].norm()
        # A sum that includes the target would be off by 1e-7 of 1, in float32 by 50 times the whole gradient. The
        # oracle's own 1 - p cancels to 1e-7 of itself.
        assert error < max(2 * torch.finfo(dtype).eps, 1e-6), (name, float(error))


def test_a_vocabulary_of_one_has_no_gradient(device: torch.device) -> None:
    inputs = draw(Recipe(dims=(2, 3, 8, 1), dtype=torch.float32, masked=0.0), device)
    found = kernel_outcome(inputs, KTOConfig())
    assert not any(bool(g.any()) for g in found.gradients.values())


#: In the second of three tiles.
PEAK = 300


def peaked(size: float, dtype: torch.dtype, device: torch.device) -> KTOInputs:
    """Tokens with one logit ``size`` above, level with, or below all others, which is some tokens' target."""
    inputs = draw(Recipe(dims=(3, 12, 24, 600), dtype=dtype), device)
    inputs.weight[:, 0] = 0.0
    inputs.weight[PEAK, 0] = size
    inputs.input[..., 0] = torch.tensor([1.0, 0.0, -1.0], dtype=dtype).repeat(4)
    # Every kind of token comes with the peak for a target and without.
    inputs.target[:, :3] = PEAK
    inputs.target[:, 3:6] = torch.tensor([5, 301, 599])
    inputs.target[inputs.target[:, 6:].eq(PEAK).nonzero()[:, 0], 6:] = 7
    return inputs


# All exponents within reach, some of them just, and some far beyond it.
@combinations("dtype, path, size", DTYPES, PATHS, [40.0, 56.0, 200.0], ids=str)
def test_probabilities_far_from_the_targets(dtype: torch.dtype, path: str, size: float, device: torch.device) -> None:
    inputs = peaked(size, dtype, device)
    assert inputs.bias is not None
    z = torch.nn.functional.linear(inputs.input.double(), inputs.weight.double(), inputs.bias.double())
    target = inputs.target.clamp(min=0).unsqueeze(-1)
    exponents = (z.amax(-1) - z.gather(-1, target).squeeze(-1)) / math.log(2.0)
    limit = LARGEST_EXPONENT.value
    assert bool((exponents > limit).any()) == (size > 40.0)
    assert bool(((exponents > limit - 10) & (exponents < limit)).any()) == (size == 56.0)
    hold_gradients(inputs, SMALL_BETA, options=options_of(path, inputs))


@combinations("dtype, path", DTYPES, PATHS, ids=str)
def test_every_token_far_from_its_target(dtype: torch.dtype, path: str, device: torch.device) -> None:
    """The tile of the peak is the only one that counts."""
    inputs = peaked(0.0, dtype, device)
    assert inputs.bias is not None
    inputs.bias[PEAK] = 200.0
    inputs.target[inputs.target == PEAK] = 4
    actual = hold_gradients(inputs, SMALL_BETA, options=options_of(path, inputs))
    assert float(actual.gradients["bias"][PEAK].abs()) > 1e-4


@combinations("dtype, path", DTYPES, PATHS, ids=str)
def test_every_target_dominates(dtype: torch.dtype, path: str, device: torch.device) -> None:
    inputs = peaked(0.0, dtype, device)
    assert inputs.bias is not None
    inputs.bias[PEAK] = 200.0
    inputs.target[inputs.target != -100] = PEAK
    hold_gradients(inputs, SMALL_BETA, options=options_of(path, inputs))


def with_dead_tile(inputs: KTOInputs) -> KTOInputs:
    """256 more classes, a tile of their own, which a bias of -inf keeps from ever being chosen."""
    assert inputs.bias is not None
    dead = inputs.weight[:256]
    return replace(
        inputs,
        weight=torch.cat((inputs.weight[:256], dead, inputs.weight[256:])),
        bias=torch.cat((inputs.bias[:256], torch.full_like(inputs.bias[:256], -torch.inf), inputs.bias[256:])),
        target=torch.where(inputs.target >= 256, inputs.target + 256, inputs.target),
    )


# At -1000 no probability is within float64's range of 1.
@combinations(
    "operands, path, level",
    {
        f"{served}-{dtype}": (hidden, dtype)
        for dtype in DTYPES
        for served, hidden in (("pointers", 19), ("descriptors", 24))
    },
    PATHS,
    [0.0, -1000.0],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_tile_without_a_finite_logit(
    operands: tuple[int, torch.dtype], path: str, level: float, device: torch.device
) -> None:
    hidden, dtype = operands
    alive = draw(Recipe(dims=(3, 7, hidden, 400), dtype=dtype), device)
    assert alive.bias is not None
    alive.bias.add_(level)
    inputs = with_dead_tile(alive)
    options = options_of(path, inputs, columns=512, validate=False)
    actual = kernel_outcome(inputs, KTOConfig(), options=options)
    expected, spread = oracle_outcome(alive, KTOConfig()), spreads(alive, KTOConfig())
    assert not objections(actual.loss, expected.loss, spread["loss"])
    for name in DIFFERENTIABLE:
        found: Any = actual.gradients[name]
        if name != "input":
            assert not bool(found[256:512].any()), name
            found = torch.cat((found[:256], found[512:]))
        assert not (problems := objections(found, expected.gradients[name], spread[name])), (name, problems)


@combinations("dtype, path", DTYPES, PATHS[:2], ids=str)
def test_an_impossible_target_leaves_the_other_sequences_alone(
    dtype: torch.dtype, path: str, device: torch.device
) -> None:
    """A bias of -inf at one target: its sequence has no log-probability, and all gradients stay finite."""
    inputs = draw(Recipe(dims=(3, 5, 24, 304), dtype=dtype, masked=0.0, kl="(B,)"), device)
    inputs.target[inputs.target == 7] = 8
    inputs.target[1, 2] = 7
    with torch.no_grad():
        inputs.bias[7] = -math.inf  # type: ignore[index]
    options = replace(options_of(path, inputs), validate=False)
    found = kernel_outcome(inputs, KTOConfig(), options=options)
    assert bool(found.loss.isfinite())
    assert all(bool(g.isfinite().all()) for g in found.gradients.values())
    assert not bool(found.gradients["input"][1].any()), "where the sigmoid is saturated there is no gradient"
    assert bool(found.gradients["input"][0].any())
