r"""Rounding-error analysis of the fused-linear KTO loss: how far a correct implementation may be from the oracle.

First order in the unit roundoffs. For token t with logits z = W x + b, p = softmax(z), the sequence's coefficient
c = ∂L/∂log π_i and the bracket e_tv = 1[v = y_t] − p_tv, with u_a the accumulator's and u_o the operands' roundoff:

- logits: α_z² = u_a² H (z²/3 + Σ_h (x_h w_h)²/6), see `ktonum.bounds.summation_variance`; `eager` adds (u_o z)²;
- log-probabilities: α_t² = α_z(y)² + Σ_v p_v² α_z(v)² + (u_a σ)² with σ² for the sum of exponentials;
- sequences: α_i² = Σ_t α_t² + (u_a log π_i)² ⌈log2 T⌉, summed pairwise;
- coefficients: |δc_i| ≤ |c_i| ρ_i with ρ_i = |∂ log c / ∂ r| times the log-ratio's amplitude, shared by the sequence;
- ∂L/∂x_t = c Σ_v e_tv w_v and ∂L/∂w_v = Σ_t c e_tv x_t: one rounding of each 16-bit operand, p's error from its logit
  and from the log-sum-exp, the coefficient's, and the accumulation over V or over N. `eager` stores c e_tv in the
  dtype under audit: where p is small that rounds c_i alike for a whole sequence, and in float16 it underflows.

Magnitudes are wanted to a few digits only: float64 on a CPU, float32 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, summation_variance, unit_roundoff
from ktonum.evaluation import Evaluation
from ktonum.kernels.formula import METRICS, KTOConfig, kl_estimate, kto_losses, reduce_losses, sequence_means
from ktonum.kernels.validation import KTOInputs

__all__ = ["kto_error_model"]

# Logits analysed at a time: half a dozen buffers of this many numbers are alive at once.
_LOGITS_AT_ONCE = 2**26
# Entries of the softmax denominator that an implementation may add one by one in the accumulator's dtype; beyond that
# it is expected to add partial sums.
_EXPONENTIALS_IN_SEQUENCE = 1024
# Tensor cores shrink policy and reference logits alike; this share of the shrinkage is not granted to cancel.
_UNCANCELLED = 0.2


@dataclass(frozen=True)
class _Head:
    """A projection to logits and the tokens it scores."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class _Sequences:
    """Per sequence, (B,), float64: log-probability, its variance, Σ (z_y − E_p z), Σ z² and Σ α_z² over all tokens."""

    logps: Tensor
    variance: Tensor
    shift: Tensor
    logit_squares: Tensor
    logit_variance: Tensor


@dataclass(frozen=True)
class _Tokens:
    """A stretch of one sequence's tokens: x (n, H), y (n,), mask (n,), and their logits (n, V) analysed."""

    sequence: int
    rows: slice
    x: Tensor
    y: Tensor
    unmasked: Tensor
    logits: Tensor
    p: Tensor
    variance: Tensor
    logsumexp_variance: Tensor


def _tokens(head: _Head, ignore_index: int, arithmetic: Arithmetic) -> Iterator[_Tokens]:
    work = torch.float32 if head.input.is_cuda else torch.float64
    weight = head.weight.to(work)
    squared_weight = weight.square()
    batch, tokens, hidden = head.input.shape
    vocabulary = weight.shape[0]
    step = max(1, _LOGITS_AT_ONCE // vocabulary)
    u = unit_roundoff(arithmetic.accumulator)
    for i in range(batch):
        for start in range(0, tokens, step):
            rows = slice(start, min(start + step, tokens))
            x, y = head.input[i, rows].to(work), head.target[i, rows]
            products = x @ weight.T
            variance = summation_variance(hidden, products, x.square() @ squared_weight.T, arithmetic.accumulator)
            logits = products if head.bias is None else products + head.bias.to(work)
            roundings = 1 if head.bias is None else 2
            variance += roundings * (unit_roundoff(arithmetic.stored) * logits).square()
            variance += (arithmetic.truncation(hidden) * products).square()
            p = logits.softmax(-1)
            # Σ_v exp(z_v − m) added up in stretches; each exponential errs by the rounding of its argument too.
            adding = min(vocabulary, _EXPONENTIALS_IN_SEQUENCE) / 3 + vocabulary / _EXPONENTIALS_IN_SEQUENCE / 3
            logsumexp = logits.logsumexp(-1, keepdim=True)
            argument = (p * (2 + (logits - logsumexp).abs())).square().sum(-1)
            logsumexp_variance = (p.square() * variance).sum(-1) + u**2 * (adding + argument + logsumexp.square()[:, 0])
            unmasked = y != ignore_index
            y = torch.where(unmasked, y, 0)
            yield _Tokens(i, rows, x, y, unmasked, logits, p, variance, logsumexp_variance)


def _sequences(head: _Head, config: KTOConfig, arithmetic: Arithmetic) -> _Sequences:
    batch, tokens, _ = head.input.shape
    sums = torch.zeros(5, batch, dtype=torch.float64, device=head.input.device)
    u = unit_roundoff(arithmetic.accumulator)
    for chunk in _tokens(head, config.ignore_index, arithmetic):
        at = chunk.y.unsqueeze(1)
        z_y = chunk.logits.gather(1, at)[:, 0]
        logps = z_y - chunk.logits.logsumexp(-1)
        variance = chunk.variance.gather(1, at)[:, 0] + chunk.logsumexp_variance + (u * logps).square()
        shift = z_y - (chunk.p * chunk.logits).sum(-1)
        masked = [torch.where(chunk.unmasked, v, 0.0).sum() for v in (logps, variance, shift)]
        every = [chunk.logits.square().sum(), chunk.variance.sum()]
        sums[:, chunk.sequence] += torch.stack([v.double() for v in (*masked, *every)])
    logps, variance, shift, squares, logit_variance = sums
    counts = (head.target != config.ignore_index).sum(1)
    variance = variance + (u * logps).square() * (1 + math.log2(max(2, tokens)))
    if config.average_log_prob:
        logps = sequence_means(logps, counts, config)
        variance, shift = variance / counts.clamp(min=1) ** 2, shift / counts.clamp(min=1)
    return _Sequences(logps, variance, shift, squares, logit_variance)


def _ratio_error(
    policy: _Sequences, reference: _Sequences | None, truncation: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Variance of log π − log π_ref, and the bound on what tensor cores shift every sequence by."""
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
) -> dict[str, tuple[Tensor, Tensor]]:
    """Bounds for the loss, the six metrics and the gradients of input, weight and bias; an `ErrorModel`."""
    config = KTOConfig(**{k: v for k, v in parameters.items() if k in {f.name for f in fields(KTOConfig)}})
    t = KTOInputs(**inputs)
    policy_head = _Head(t.input, t.weight, t.bias, t.target)
    policy = _sequences(policy_head, config, arithmetic)
    reference = None
    ref_logps = t.ref_logps
    if t.ref_input is not None and t.ref_weight is not None:
        reference = _sequences(_Head(t.ref_input, t.ref_weight, t.ref_bias, t.target), config, arithmetic)
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

    u = unit_roundoff(arithmetic.accumulator)
    ratio_amplitude = ratio_variance.sqrt()
    bounds = _output_bounds(t, config, policy, ratio_variance, ratio_shift, (slope, losses, kl_error), truncation[0], u)
    relative = (curvature.nan_to_num() / slope).abs().nan_to_num(posinf=0.0)
    shared = relative * (ratio_shift + kl_error) + 4 * unit_roundoff(arithmetic.stored)
    own = relative * ratio_amplitude
    if any(g is not None for g in oracle.gradients.values()):
        by_token = _token_coefficients(t, coefficients, config)
        bounds.update(_gradient_bounds(policy_head, config, arithmetic, oracle, by_token, own, shared))
    return bounds


def _kl(
    t: KTOInputs, config: KTOConfig, arithmetic: Arithmetic, truncation: tuple[float, float]
) -> tuple[Tensor | None, Tensor]:
    """The KL reference point and the bound on its error, which all sequences share."""
    zero = torch.zeros((), dtype=torch.float64, device=t.input.device)
    if t.kl is not None:
        return t.kl.double(), zero
    if t.kl_input is None or t.kl_target is None:
        return None, zero
    policy = _sequences(_Head(t.kl_input, t.weight, t.bias, t.kl_target), config, arithmetic)
    reference = None
    ref_logps = torch.zeros_like(policy.logps) if t.kl_ref_logps is None else t.kl_ref_logps.double()
    if t.kl_ref_input is not None and t.ref_weight is not None:
        reference = _sequences(_Head(t.kl_ref_input, t.ref_weight, t.ref_bias, t.kl_target), config, arithmetic)
        ref_logps = reference.logps
    variance, shift = _ratio_error(policy, reference, truncation)
    # One number for the whole batch: its random part is as shared as its systematic one. Three amplitudes.
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
    policy: _Sequences,
    ratio_variance: Tensor,
    ratio_shift: Tensor,
    formula: tuple[Tensor, Tensor, Tensor],
    truncation: float,
    u: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    slope, losses, kl_error = formula
    # ℓ_i: its own log-ratio's error, the shared one, and a few roundings of the formula.
    own = (slope.square() * ratio_variance + (4 * u * losses.nan_to_num()).square()).nan_to_num()
    shared = (slope.abs() * (ratio_shift + kl_error)).nan_to_num()
    weights = {"mean": 1 / max(1, int((~losses.isnan()).sum())), "sum": 1.0}
    if config.reduction == "none":
        bounds = {"loss": (own.sqrt(), shared)}
    else:
        factor = weights[config.reduction]
        bounds = {"loss": (factor * own.sum().sqrt(), factor * shared.sum())}
    logit_sums = policy.logit_variance + u**2 * policy.logit_squares * math.log2(2 + t.target.numel())
    quantities = {
        "logps": (policy.variance, truncation * policy.shift.abs()),
        "logits": (logit_sums, torch.zeros_like(logit_sums)),
        "rewards": (config.beta**2 * ratio_variance, abs(config.beta) * ratio_shift),
    }
    for name in METRICS:
        side, quantity, _ = name.split("_")
        chosen = t.preference_labels if side == "chosen" else ~t.preference_labels
        variance, shift = quantities[quantity]
        bounds[name] = ((chosen * variance).sum().sqrt(), (chosen * shift).sum())
    return bounds


def _gradient_bounds(
    head: _Head,
    config: KTOConfig,
    arithmetic: Arithmetic,
    oracle: Evaluation,
    coefficients: Tensor,
    own: Tensor,
    shared: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Bounds for grad_input, grad_weight and grad_bias; ``own`` and ``shared`` are relative errors of c_i, (B,)."""
    work = torch.float32 if head.input.is_cuda else torch.float64
    device = head.input.device
    weight = head.weight.to(work)
    squared_weight = weight.square()
    vocabulary, hidden = weight.shape
    rows = int((head.target != config.ignore_index).sum())
    operand = unit_roundoff(arithmetic.operands) ** 2
    # Half the spacing of subnormals, which a stored c e_tv cannot fall below; relative to u, as `squares` are.
    underflow = (torch.finfo(arithmetic.stored).smallest_normal * torch.finfo(arithmetic.stored).eps / 2) ** 2 / operand
    u = unit_roundoff(arithmetic.accumulator)
    input_variance = torch.zeros(head.input.shape, dtype=work, device=device)
    input_coherent = torch.zeros_like(input_variance)
    # Three sums over tokens: with x, and with 1 in x's place for the bias.
    x_sums = {
        k: torch.zeros(vocabulary, hidden, dtype=work, device=device) for k in ("squares", "variance", "coherent")
    }
    b_sums = {k: torch.zeros(vocabulary, dtype=work, device=device) for k in ("squares", "variance", "coherent")}
    sequence_x, sequence_b = torch.zeros_like(x_sums["squares"]), torch.zeros_like(b_sums["squares"])
    sequence = 0

    def close_sequence() -> None:
        # c_i's error multiplies the sequence's whole contribution.
        for sums, total in ((x_sums, sequence_x), (b_sums, sequence_b)):
            sums["variance"].addcmul_(total, total, value=float(own[sequence] ** 2))
            sums["coherent"].add_(total.abs(), alpha=float(shared[sequence]))
            total.zero_()

    for chunk in _tokens(head, config.ignore_index, arithmetic):
        if chunk.sequence != sequence:
            close_sequence()
            sequence = chunk.sequence
        c = coefficients[sequence, chunk.rows].to(work).unsqueeze(1)
        e = -chunk.p
        e.scatter_add_(1, chunk.y.unsqueeze(1), torch.ones_like(c))
        squares = (c * e).square() + torch.where(chunk.unmasked, underflow, 0.0).to(work).unsqueeze(1)
        p_variance = (c * chunk.p).square() * chunk.variance
        x2 = chunk.x.square()
        gradient = c * (e @ weight)
        roundings = squares @ squared_weight
        input_variance[sequence, chunk.rows] = (
            operand * roundings
            + p_variance @ squared_weight
            + summation_variance(vocabulary, gradient, roundings, arithmetic.accumulator)
        )
        expected_weight = c * weight[chunk.y] - gradient  # c Σ_v p_v w_v
        input_coherent[sequence, chunk.rows] = (
            3 * chunk.logsumexp_variance.sqrt().unsqueeze(1) * expected_weight.abs()
            + (3 * own[sequence] + shared[sequence] + arithmetic.truncation(vocabulary)) * gradient.abs()
        )
        p_variance += (c * chunk.p).square() * chunk.logsumexp_variance.unsqueeze(1)
        x_sums["squares"] += squares.T @ x2
        x_sums["variance"] += p_variance.T @ x2
        b_sums["squares"] += squares.sum(0)
        b_sums["variance"] += p_variance.sum(0)
        sequence_x.addmm_((c * e).T, chunk.x)
        sequence_b.add_((c * e).sum(0))
    close_sequence()

    def assembled(name: str, sums: Mapping[str, Tensor], roundings: float) -> tuple[Tensor, Tensor]:
        total = oracle.gradients[name]
        assert total is not None  # asked for only where the oracle has a gradient
        accumulation = summation_variance(rows, total.to(work), sums["squares"], arithmetic.accumulator)
        variance = roundings * operand * sums["squares"] + sums["variance"] + accumulation
        return variance.sqrt(), sums["coherent"] + (arithmetic.truncation(rows) + u) * total.abs().to(work)

    bounds = {}
    if oracle.gradients.get("input") is not None:
        bounds["grad_input"] = (input_variance.sqrt(), input_coherent)
    if oracle.gradients.get("weight") is not None:
        bounds["grad_weight"] = assembled("weight", x_sums, 2.0)
    if oracle.gradients.get("bias") is not None:
        bounds["grad_bias"] = assembled("bias", b_sums, 1.0)
    return bounds
