"""The reference against what others publish: TRL's trainer and Liger-Kernel's loss, and against itself.

Both compute in float32, so each comparison allows for float32 rounding: a bound on it is worked out for every output of
every case, and a parameter off by one part in a thousand is shown to exceed it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.contract.reference import reference_kto_loss
from support.combinations import combinations

UNIT = 2.0**-24  # float32's unit roundoff
B, T, H, V = 5, 6, 12, 41
KL_B, KL_T = 3, 4
UPSTREAM = -1.75
DIFFERENTIABLE = ("input", "weight", "bias")
BATCHES = ("mixed", "desirable", "undesirable", "masked sequence", "all masked")
Outputs = dict[str, Tensor]


def draw(
    batch: str = "mixed", *options: str, ignore_index: int = -100, dtype: torch.dtype = torch.float64
) -> KTOInputs:
    """Inputs with float32 values; ``options`` name the further tensors: bias, ref, ref_logps, kl, kl sequences."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    def targets(*shape: int) -> Tensor:
        drawn = torch.randint(0, V, shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.3, ignore_index, drawn)

    labels = {"desirable": torch.ones(B, dtype=torch.bool), "undesirable": torch.zeros(B, dtype=torch.bool)}
    tensors: dict[str, Tensor] = {
        "input": normal(B, T, H),
        "weight": normal(V, H, scale=0.4),
        "target": targets(B, T),
        "preference_labels": labels.get(batch, torch.tensor([True, False, False, True, False])),
    }
    drawn = {
        "bias": {"bias": normal(V)},
        "ref": {"ref_input": normal(B, T, H), "ref_weight": normal(V, H, scale=0.4), "ref_bias": normal(V)},
        "ref_logps": {"ref_logps": -normal(B).abs() * 5 - 10},
        "kl": {"kl": normal(1).abs() + 4},
        "kl sequences": {"kl_input": normal(KL_B, KL_T, H) * 3, "kl_target": targets(KL_B, KL_T)},
        "kl_ref": {"kl_ref_input": normal(KL_B, KL_T, H) * 3},
        "kl_ref_logps": {"kl_ref_logps": -normal(KL_B).abs() * 5 - 60},
    }
    for option in options:
        tensors |= drawn[option]
    if batch == "masked sequence":
        tensors["target"][2] = ignore_index
    if batch == "all masked":
        tensors["target"][:] = ignore_index
    return KTOInputs(**tensors)


def outputs(inputs: KTOInputs, loss: Tensor, metrics: tuple[Tensor | None, ...]) -> Outputs:
    """Loss, metrics and gradients for an upstream gradient other than 1, by name, in float64."""
    named = dict(zip(("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits"), metrics, strict=False))
    named |= {"chosen_rewards": metrics[4], "rejected_rewards": metrics[5], "loss": loss}
    given = {name: tensor for name, tensor in inputs.tensors().items() if name in DIFFERENTIABLE}
    gradients = torch.autograd.grad(loss, list(given.values()), UPSTREAM * torch.ones_like(loss))
    named |= {f"grad_{name}": gradient for name, gradient in zip(given, gradients, strict=True)}
    return {name: value.detach().double() for name, value in named.items() if value is not None}


def leaves(inputs: KTOInputs, dtype: torch.dtype) -> KTOInputs:
    """The same values in ``dtype``, detached, the differentiable ones asking for a gradient."""
    cast = {n: t.detach().to(dtype, copy=True) for n, t in inputs.tensors().items() if t.is_floating_point()}
    for name in DIFFERENTIABLE:
        if name in cast:
            cast[name].requires_grad_()
    return replace(inputs, **cast)


def oracle(inputs: KTOInputs, config: KTOConfig, **settings: int) -> Outputs:
    """The reference in float64."""
    given = leaves(inputs, torch.float64)
    return outputs(given, *reference_kto_loss(given, config, **settings))


def published(loss_class: Any, inputs: KTOInputs, dtype: torch.dtype, **parameters: Any) -> Outputs:
    """A loss class with Liger's interface, on the same values."""
    given = leaves(inputs, dtype)
    tensors = given.tensors()
    for name, theirs in (("input", "_input"), ("weight", "lin_weight")):
        tensors[theirs] = tensors.pop(name)
    uses_reference = inputs.ref_input is not None or inputs.ref_logps is not None
    return outputs(given, *loss_class(use_ref_model=uses_reference, **parameters)(**tensors))


def sequence_bound(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, config: KTOConfig) -> Outputs:
    """Float32 rounding of one pass over a head: the deterministic bounds, gamma_n = n u, for each kind of sum."""
    magnitude = input.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    # H products and a bias in the logit, of which target and logsumexp each have one; V exponentials of arguments off
    # by two roundings in the sum, whose relative error is the logarithm's absolute one; a handful of operations.
    largest = magnitude.amax(-1)
    token = UNIT * (2 * (input.shape[-1] + 2) * largest + 6 * largest + weight.shape[0] + 2 * math.log(V) + 8)
    token = token + UNIT * target.shape[1] * (2 * largest + math.log(V))  # the sum over the sequence
    unmasked = target != config.ignore_index
    length = unmasked.sum(1).clamp(min=1) if config.average_log_prob else 1
    logits = UNIT * (input.shape[-1] + 2 + T * V) * magnitude.sum((1, 2))
    return {"token": token, "sequence": (token * unmasked).sum(1) / length, "logits": logits}


def bounds(inputs: KTOInputs, config: KTOConfig) -> Outputs:
    """How far a float32 computation may be from the float64 one, by output."""
    given = leaves(inputs, torch.float64)
    policy = sequence_bound(given.input, given.weight, given.bias, given.target, config)
    ratio = policy["sequence"].clone()
    if given.ref_input is not None and given.ref_weight is not None:
        ratio += sequence_bound(given.ref_input, given.ref_weight, given.ref_bias, given.target, config)["sequence"]
    if given.ref_logps is not None:
        ratio += 2 * UNIT * given.ref_logps.abs()
    kl_error = 0.0 if given.kl is None else 2 * UNIT * given.kl.abs().item()
    if given.kl_input is not None and given.kl_target is not None:
        error = sequence_bound(given.kl_input, given.weight, given.bias, given.kl_target, config)["sequence"]
        if given.kl_ref_input is not None and given.ref_weight is not None:
            error += sequence_bound(given.kl_ref_input, given.ref_weight, given.ref_bias, given.kl_target, config)[
                "sequence"
            ]
        kl_error = error.mean().item() + 8 * UNIT * 100
    labels = given.preference_labels
    weights = torch.where(labels, config.desirable_weight, config.undesirable_weight).double()
    losses, _ = reference_kto_loss(given, replace(config, reduction="none"))
    # The margins' roundings are relative to ratios below 100; sigmoid's slope is at most 1/4.
    margin = config.beta * (ratio + kl_error + 4 * UNIT * 100)
    loss = (weights * (margin / 4 + 4 * UNIT)).nanmean() * (1 + B * UNIT)
    # Gradient of the logits: g_i (one-hot - p); |d log g| <= |d margin| + the rounding of sigmoid (1 - sigmoid).
    share = (losses / weights).detach().nan_to_num(0.5)
    g = (UPSTREAM * config.beta * weights * share * (1 - share) / B).abs()
    if config.average_log_prob:
        g = g / (given.target != config.ignore_index).sum(1).clamp(min=1) * B / (~losses.isnan()).sum()
    g_error = margin + 4 * UNIT / torch.minimum(share, 1 - share) + 8 * UNIT
    bias = 0 if given.bias is None else given.bias
    p = (given.input @ given.weight.T + bias).softmax(-1).detach()
    unmasked = (given.target != config.ignore_index).unsqueeze(-1)
    spread = (torch.nn.functional.one_hot(given.target.clamp(0, V - 1), V) + p) * unmasked * g.view(-1, 1, 1)
    error = spread * (g_error.view(-1, 1, 1) + 2 * policy["token"].unsqueeze(-1) + (V + B * T + 4) * UNIT)
    return {
        "loss": loss,
        **_split("logps", policy["sequence"], labels),
        **_split("logits", policy["logits"], labels),
        **_split("rewards", config.beta * (ratio + 4 * UNIT * 100), labels),
        "grad_input": error @ given.weight.abs(),
        "grad_weight": error.flatten(0, 1).T @ given.input.abs().flatten(0, 1),
        "grad_bias": error.sum((0, 1)),
    }


def _split(name: str, error: Tensor, labels: Tensor) -> Outputs:
    room = (1 + B * UNIT) * error + B * UNIT * 100
    return {f"chosen_{name}": room[labels].sum() + UNIT, f"rejected_{name}": room[~labels].sum() + UNIT}


def misses(actual: Outputs, expected: Outputs, allowed: Outputs) -> list[str]:
    """Names of outputs beyond their bound, NaN included; both sides must have the same outputs but for TRL's logits."""
    assert set(expected) - set(actual) <= {"chosen_logits", "rejected_logits"} and set(actual) <= set(expected)
    return [n for n, value in actual.items() if not ((value - expected[n]).abs() <= allowed[n].detach()).all()]


FORMS = {
    "no reference": (),
    "reference": ("bias", "ref"),
    "precomputed": ("ref_logps",),
    "given kl": ("ref", "kl"),
    "kl sequences": ("bias", "ref", "kl sequences", "kl_ref"),
    "precomputed, kl sequences": ("ref_logps", "kl sequences", "kl_ref_logps"),
    "no reference, kl sequences": ("kl sequences",),
}


@pytest.fixture(scope="module")
def trl_class() -> Any:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'ktonum[peers]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ktonum.kernels.peers.trl_loss import TRLKTOLoss

        TRLKTOLoss()
    return TRLKTOLoss


@pytest.fixture(scope="module")
def liger_class() -> Any:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'ktonum[peers]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss
    return LigerFusedLinearKTOLoss


LOSSES = [("kto", form) for form in FORMS] + [("apo_zero_unpaired", form) for form in FORMS if "kl" not in form]


@combinations("batch, loss", BATCHES, {"-".join(loss): loss for loss in LOSSES})
def test_agrees_with_trl(trl_class: Any, loss: tuple[Any, str], batch: str) -> None:
    loss_type, form = loss
    parameters = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    for dtype in (torch.float64, torch.float32):
        for ignore_index in (-100, 3):
            inputs = draw(batch, *FORMS[form], ignore_index=ignore_index)
            config = KTOConfig(ignore_index=ignore_index, **parameters)
            actual = published(trl_class, inputs, dtype, ignore_index=ignore_index, **parameters)
            assert misses(actual, oracle(inputs, config), bounds(inputs, config)) == []


@combinations(
    "ignore_index, batch, form, average_log_prob",
    [-100, 3],
    ["mixed", "desirable", "undesirable"],
    ["no reference", "reference", "given kl"],
    [False, True],
    strength=2,
)
def test_agrees_with_liger(liger_class: Any, ignore_index: int, batch: str, form: str, average_log_prob: bool) -> None:
    inputs = draw(batch, *FORMS[form], ignore_index=ignore_index)
    if inputs.kl is not None:
        inputs = replace(inputs, kl=-inputs.kl)  # Liger, unlike TRL, takes a reference point below 0
    config = KTOConfig(ignore_index=ignore_index, beta=0.3, average_log_prob=average_log_prob)
    parameters = {"ignore_index": ignore_index, "beta": 0.3, "average_log_prob": average_log_prob, "compiled": False}
    actual = published(liger_class, inputs, torch.float32, **parameters)
    assert misses(actual, oracle(inputs, config), bounds(inputs, config)) == []


@pytest.mark.parametrize("parameter", ["beta", "desirable_weight", "undesirable_weight", "kl"])
def test_the_comparison_notices_one_part_in_a_thousand(trl_class: Any, parameter: str) -> None:
    inputs, config = draw("mixed", *FORMS["given kl"]), KTOConfig(beta=0.3)
    if parameter == "kl":
        assert inputs.kl is not None
        wrong, wrong_config = replace(inputs, kl=inputs.kl * 1.001), config
    else:
        wrong, wrong_config = inputs, replace(config, **{parameter: getattr(config, parameter) * 1.001})
    actual = published(trl_class, inputs, torch.float64, beta=0.3)
    missed = misses(actual, oracle(wrong, wrong_config), bounds(inputs, config))
    assert {"loss", "grad_input", "grad_weight"} <= set(missed)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_average_leaves_out_a_sequence_without_tokens(reduction: Any) -> None:
    config = KTOConfig(average_log_prob=True, reduction=reduction, desirable_weight=1.3)
    inputs = leaves(draw("masked sequence", "bias", "ref", "kl"), torch.float64)
    kept = torch.tensor([0, 1, 3, 4])
    names = ("input", "target", "preference_labels", "ref_input")
    without = leaves(replace(inputs, **{n: inputs.tensors()[n][kept] for n in names}), torch.float64)
    loss, metrics = reference_kto_loss(inputs, config)
    expected, expected_metrics = reference_kto_loss(without, config)
    if reduction == "none":
        assert loss.isnan().tolist() == [False, False, True, False, False]
        loss, expected = loss[kept].sum(), expected.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    # Liger's logits sums count every token, masked or not.
    for i in (0, 1, 4, 5):
        torch.testing.assert_close(metrics[i], expected_metrics[i], rtol=1e-14, atol=0)
    gradients = torch.autograd.grad(loss, [inputs.input, inputs.weight])
    expected_gradients = torch.autograd.grad(expected, [without.input, without.weight])
    assert not gradients[0][2].any()
    torch.testing.assert_close(gradients[0][kept], expected_gradients[0], rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(gradients[1], expected_gradients[1], rtol=1e-12, atol=1e-16)


def test_average_of_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"every token of target is masked .* drop the batch or pass average_log_prob"):
        reference_kto_loss(draw("all masked"), KTOConfig(average_log_prob=True))


@pytest.mark.parametrize("average_log_prob", [False, True])
def test_one_sequence_at_a_time_is_the_same(average_log_prob: bool) -> None:
    inputs = draw("mixed", "bias", "ref", "kl sequences", "kl_ref")
    config = KTOConfig(average_log_prob=average_log_prob)
    whole = oracle(inputs, config)
    for name, value in oracle(inputs, config, logits_at_once=1).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-15)


def test_no_gradient_reaches_what_is_given_as_known() -> None:
    inputs = leaves(draw("mixed", "ref", "kl"), torch.float64)
    precomputed = leaves(draw("mixed", "ref_logps", "kl sequences", "kl_ref_logps"), torch.float64)
    for given in (inputs, precomputed):
        known = {n: t for n, t in given.tensors().items() if n.startswith(("ref_", "kl")) and t.is_floating_point()}
        for tensor in known.values():
            tensor.requires_grad_()
        loss, metrics = reference_kto_loss(given, KTOConfig())
        gradients = torch.autograd.grad(loss, list(known.values()), allow_unused=True)
        assert dict(zip(known, gradients, strict=True)) == dict.fromkeys(known)
        assert not any(metric.requires_grad for metric in metrics)
