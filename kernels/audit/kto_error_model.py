r"""Rounding-error analysis of the fused-linear KTO loss: how far a correct implementation may be from the oracle.

First order in the unit roundoffs. For token t with logits z = W x + b, p = softmax(z), the sequence's coefficient
c = ∂L/∂log π_i and the bracket e_tv = 1[v = y_t] − p_tv, with u_a the accumulator's and u_o the operands' roundoff:

- logits: α_z² = u_a² H (z²/3 + Σ_h (x_h w_h)²/6), see `ktonum.bounds.summation_variance`; `eager` adds (u_o z)²;
- log-probabilities: α_t² = α_z(y)² + Σ_v p_v² α_z(v)² + (u_a σ)² with σ² for the sum of exponentials;
- sequences: α_i² = Σ_t α_t² + (u_a log π_i)² ⌈log2 T⌉, summed pairwise;
- coefficients: |δc_i| ≤ |c_i| ρ_i with ρ_i = |∂ log c / ∂ r| times the log-ratio's amplitude, shared by the sequence;
- ∂L/∂x_t = c Σ_v e_tv w_v and ∂L/∂w_v = Σ_t c e_tv x_t: one rounding of each 16-bit operand, p's error from its logit
  and from the log-sum-exp, the coefficient's error, and the accumulation over V or over N. If the targets' terms are
  added apart, the partial sums are those of the softmax's part alone. Over N they may be those of all sequences that
  pull one way. `eager` stores c e_tv in the dtype under audit. Where p is small, that rounds c_i in the same way for a
  whole sequence, and in float16 it underflows.

A few digits of each magnitude are enough, so the analysis runs in float64 on a CPU and in float32 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, amplitude, unit_roundoff
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation
from ktonum.kernels.audit.gradient_errors import gradient_bounds
from ktonum.kernels.audit.logit_errors import IN_SEQUENCE, ScoredTokens, SequenceErrors, analysed_sequences
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import METRICS, kl_estimate, kto_losses, reduce_losses
from ktonum.kernels.contract.inputs import KTOInputs

__all__ = ["kto_error_model"]

# Tensor cores shrink the logits of policy and reference alike. All but this share of the smaller one is taken to
# cancel.
_UNCANCELLED = 0.2


def _ratio_error(
    policy: SequenceErrors, reference: SequenceErrors | None, truncation: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The variance of log π − log π_ref, and a bound on how far tensor cores shift it, for each sequence."""
    mine = truncation[0] * policy.shift
    if reference is None:
        return policy.variance, mine.abs()
    theirs = truncation[1] * reference.shift
    shift = (mine - theirs).abs() + _UNCANCELLED * torch.minimum(mine.abs(), theirs.abs())
    return policy.variance + reference.variance, shift


def kto_error_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """Bounds for the loss, the six metrics and the gradients of input, weight and bias; an `ErrorModel`."""
    config = KTOConfig(**{k: v for k, v in parameters.items() if k in {f.name for f in fields(KTOConfig)}})
    t = KTOInputs(**inputs)
    policy_head = ScoredTokens(t.input, t.weight, t.bias, t.target)
    policy = analysed_sequences(policy_head, config, arithmetic)
    reference = None
    ref_logps = t.ref_logps
    if t.ref_input is not None and t.ref_weight is not None:
        reference = analysed_sequences(
            ScoredTokens(t.ref_input, t.ref_weight, t.ref_bias, t.target), config, arithmetic
        )
        ref_logps = reference.logps
    ref_hidden = t.input.shape[-1] if t.ref_weight is None else t.ref_weight.shape[1]
    truncation = (arithmetic.truncation(t.input.shape[-1]), arithmetic.truncation(ref_hidden))
    ratio_variance, ratio_shift = _ratio_error(policy, reference, truncation)
    kl, kl_error = _kl(t, config, arithmetic, truncation)

    # ∂ℓ_i/∂r_i and ∂²ℓ_i/∂r_i² of the formula itself, by autograd.
    logps = policy.logps.detach().requires_grad_()
    losses = kto_losses(logps, None if ref_logps is None else ref_logps.double(), t.preference_labels, kl, config)
    (slope,) = torch.autograd.grad(losses.nansum(), logps, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.nansum(), logps)
    slope, losses = slope.detach().nan_to_num(), losses.detach()
    upstream_loss = upstream.get("loss", torch.ones_like(reduce_losses(losses, config))).double()
    share = _upstream_share(losses, upstream_loss, config)
    coefficients = share * slope

    roundoffs = (unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored))
    ratio_amplitude = ratio_variance.sqrt()
    bounds = _output_bounds(
        t, config, policy, ratio_variance, ratio_shift, (slope, losses, kl_error), truncation[0], roundoffs
    )
    relative = (curvature.nan_to_num() / slope).abs().nan_to_num(posinf=0.0)
    shared = relative * (ratio_shift + kl_error) + 4 * unit_roundoff(arithmetic.stored)
    own = relative * ratio_amplitude
    if any(g is not None for g in oracle.gradients.values()):
        by_token = _token_coefficients(t, coefficients, config)
        bounds.update(gradient_bounds(policy_head, config, arithmetic, oracle, by_token, own, shared))
    return bounds


def _kl(
    t: KTOInputs, config: KTOConfig, arithmetic: Arithmetic, truncation: tuple[float, float]
) -> tuple[Tensor | None, Tensor]:
    """The KL reference point, and a bound on its error. All sequences share both."""
    zero = torch.zeros((), dtype=torch.float64, device=t.input.device)
    if t.kl is not None:
        return t.kl.double(), zero
    if t.kl_input is None or t.kl_target is None:
        return None, zero
    policy = analysed_sequences(ScoredTokens(t.kl_input, t.weight, t.bias, t.kl_target), config, arithmetic)
    reference = None
    ref_logps = torch.zeros_like(policy.logps) if t.kl_ref_logps is None else t.kl_ref_logps.double()
    if t.kl_ref_input is not None and t.ref_weight is not None:
        reference = analysed_sequences(
            ScoredTokens(t.kl_ref_input, t.ref_weight, t.ref_bias, t.kl_target), config, arithmetic
        )
        ref_logps = reference.logps
    variance, shift = _ratio_error(policy, reference, truncation)
    # It is one number for the whole batch, so its random error is shared like the systematic one: three amplitudes of
    # it.
    return kl_estimate(policy.logps, ref_logps), 3 * variance.sum().sqrt() / variance.numel() + shift.mean()


def _upstream_share(losses: Tensor, upstream: Tensor, config: KTOConfig) -> Tensor:
    """∂ Σ⟨upstream, loss⟩ / ∂ℓ_i, (B,)."""
    losses = losses.requires_grad_()
    (share,) = torch.autograd.grad(reduce_losses(losses, config), losses, grad_outputs=upstream)
    return share.nan_to_num()


def _token_coefficients(t: KTOInputs, coefficients: Tensor, config: KTOConfig) -> Tensor:
    """c_t, (B, T): 0 for masked tokens."""
    unmasked = t.target != config.ignore_index
    counts = unmasked.sum(1).clamp(min=1) if config.average_log_prob else torch.ones_like(coefficients)
    return torch.where(unmasked, (coefficients / counts).unsqueeze(1), 0.0)


def _output_bounds(
    t: KTOInputs,
    config: KTOConfig,
    policy: SequenceErrors,
    ratio_variance: Tensor,
    ratio_shift: Tensor,
    formula: tuple[Tensor, Tensor, Tensor],
    truncation: float,
    roundoffs: tuple[float, float],
) -> dict[str, DerivedErrors]:
    (slope, losses, kl_error), (u, stored) = formula, roundoffs
    # The error of ℓ_i: that of its own log-ratio, the shared one, and a few roundings of the formula.
    own = (slope.square() * ratio_variance + (4 * u * losses.nan_to_num()).square()).nan_to_num()
    shared = (slope.abs() * (ratio_shift + kl_error)).nan_to_num()
    weights = {"mean": 1 / max(1, int((~losses.isnan()).sum())), "sum": 1.0}
    if config.reduction == "none":
        bounds = {"loss": DerivedErrors(amplitude(own), shared)}
    else:
        factor = weights[config.reduction]
        bounds = {"loss": DerivedErrors(factor * amplitude(own.sum()), factor * shared.sum())}
    quantities = {
        "logps": (policy.variance, truncation * policy.shift.abs()),
        "rewards": (config.beta**2 * ratio_variance, abs(config.beta) * ratio_shift),
    }
    for name in METRICS:
        side, quantity, _ = name.split("_")
        chosen = t.preference_labels if side == "chosen" else ~t.preference_labels
        if quantity == "logits":
            variance = _logit_sum_variance(policy, chosen, t.target.shape[1] * t.weight.shape[0], (u, stored))
            bounds[name] = DerivedErrors(amplitude(variance), torch.zeros_like(variance))
        else:
            variances, shift = quantities[quantity]
            bounds[name] = DerivedErrors(amplitude((chosen * variances).sum()), (chosen * shift).sum())
    return bounds


def _logit_sum_variance(policy: SequenceErrors, chosen: Tensor, each: int, roundoffs: tuple[float, float]) -> Tensor:
    """The variance of the sum of all logits of the chosen sequences, which have ``each`` logits each.

    Logits are added in stretches of `IN_SEQUENCE`, and the stretches' sums in stretches again. The partial sums of the
    last level are those of the whole, and the squares of the terms count once for each level. `eager` may store the
    sums, too.
    """
    u, stored = roundoffs
    terms = max(1, int(chosen.sum()) * each)
    levels = math.ceil(math.log(terms, IN_SEQUENCE)) or 1
    total, squares = (chosen * policy.logit_sum.abs()).sum(), (chosen * policy.logit_squares).sum()
    adding = u**2 * min(terms, IN_SEQUENCE) * (total.square() / 3 + levels * squares / 6)
    return adding + (chosen * policy.logit_variance).sum() + (stored * total).square()
