"""How far rounding may carry the kernels from the oracle, derived from the algorithm; and the comparison with it.

Every rounding multiplies a number by 1 + e with |e| <= u, the unit roundoff. To first order the error of a result is
the sum of its terms' errors. For independent errors of mean zero Hoeffding's inequality bounds the sum by
``L * spread`` with spread**2 the sum of the squares of the terms' bounds, except with probability 2 exp(-L**2 / 2)
(Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019). `spreads`
computes that for every output; no constant in it is fitted to what the kernels do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import kl_estimate, kto_losses, reduce_losses, sequence_means
from ktonum.kernels.contract.inputs import KTOInputs

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
#: Half the smallest subnormal: the error of rounding where a number is too small for relative precision.
_UNDERFLOW = {torch.float64: 0.0, torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
#: Chance at which a right result would be called wrong, were rounding errors random.
_FALSE_ALARM = 1e-9


def _wide(dtype: torch.dtype) -> float:
    """Unit roundoff of the accumulator."""
    return UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


@dataclass(frozen=True)
class _Tokens:
    """Softmax of N unmasked or masked tokens in float64, and what rounding does to it."""

    p: Tensor
    residual: Tensor  # 1[v = y] - p, 0 in masked rows
    others: Tensor  # p, 0 at the targets and in masked rows
    p_spread: Tensor  # of p, relative
    logp: Tensor  # (B, T), 0 where masked
    logp_spread: Tensor  # (B, T), absolute


def _tokens(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, config: KTOConfig) -> _Tokens:
    u = _wide(input.dtype)
    x, w = input.detach().double().flatten(0, 1), weight.detach().double()
    y, hidden = target.flatten().long(), x.shape[1]
    z, size = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        z, size = z + bias.detach().double(), size + bias.detach().double().abs()
    lse = z.logsumexp(1, keepdim=True)
    p = (z - lse).exp()
    # A sum of H terms (and the bias) rounds each of its partial sums, none of which exceeds the sum of the absolutes.
    z_spread = u * math.sqrt(hidden + 1) * size
    # The softmax's denominator inherits the logits' errors weighted by p (no more than the largest), each exp errs by
    # that of its argument and two more ulps, and a tile adds up at most 256 of them, all positive.
    arguments = (u * (z - lse).abs() * p).square().sum(1, keepdim=True)
    lse_spread = (z_spread.square().amax(1, keepdim=True) + arguments + (u * (2 + math.sqrt(256))) ** 2).sqrt()
    # The backward subtracts lse, rounded to the accumulator, and exponentiates.
    p_spread = (z_spread**2 + lse_spread**2 + (u * lse) ** 2 + (u * ((z - lse).abs() + 2)) ** 2).sqrt()
    unmasked = y != config.ignore_index
    index = torch.where(unmasked, y, 0).unsqueeze(1)
    one_hot = torch.zeros_like(p).scatter_(1, index, 1.0)
    logp = torch.where(unmasked, (z - lse).gather(1, index).squeeze(1), 0.0)
    at_target = (z_spread.gather(1, index).square() + lse_spread**2).sqrt().squeeze(1)
    return _Tokens(
        p,
        (one_hot - p) * unmasked.unsqueeze(1),
        p * (1 - one_hot) * unmasked.unsqueeze(1),
        p_spread,
        logp.view(target.shape),
        torch.where(unmasked, at_target, 0.0).view(target.shape),
    )


def _sequences(tokens: _Tokens, target: Tensor, config: KTOConfig) -> tuple[Tensor, Tensor]:
    """Log-probability and its spread, (B,)."""
    counts = (target != config.ignore_index).sum(1)
    logps, spread = tokens.logp.sum(1), tokens.logp_spread.square().sum(1).sqrt()
    # T partial sums in float64.
    spread = (spread**2 + (2.0**-53 * math.sqrt(target.shape[1]) * logps.abs()) ** 2).sqrt()
    return sequence_means(logps, counts, config), spread / counts.clamp(min=1) if config.average_log_prob else spread


def spreads(inputs: KTOInputs, config: KTOConfig, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """The spread of ``loss``, of the six ``metrics`` and of the gradients of ``input``, ``weight`` and ``bias``."""
    dtype = inputs.input.dtype
    u, wide = UNIT_ROUNDOFF[dtype], _wide(dtype)
    labels = inputs.preference_labels
    policy = _tokens(inputs.input, inputs.weight, inputs.bias, inputs.target, config)
    logps, logps_spread = _sequences(policy, inputs.target, config)
    ratio_variance = logps_spread**2
    reference = None if inputs.ref_logps is None else inputs.ref_logps.double()
    if inputs.ref_input is not None and inputs.ref_weight is not None:
        model = _tokens(inputs.ref_input, inputs.ref_weight, inputs.ref_bias, inputs.target, config)
        reference, reference_spread = _sequences(model, inputs.target, config)
        ratio_variance = ratio_variance + reference_spread**2
    reward_spread = config.beta * ratio_variance.sqrt()
    kl = None if inputs.kl is None else inputs.kl.double()
    if inputs.kl_input is not None and inputs.kl_target is not None:
        model = _tokens(inputs.kl_input, inputs.weight, inputs.bias, inputs.kl_target, config)
        kl_logps, kl_spread = _sequences(model, inputs.kl_target, config)
        kl_variance = kl_spread.square().sum()
        kl_reference = torch.zeros_like(kl_logps) if inputs.kl_ref_logps is None else inputs.kl_ref_logps.double()
        if inputs.kl_ref_input is not None and inputs.ref_weight is not None:
            model = _tokens(inputs.kl_ref_input, inputs.ref_weight, inputs.ref_bias, inputs.kl_target, config)
            kl_reference, kl_spread = _sequences(model, inputs.kl_target, config)
            kl_variance = kl_variance + kl_spread.square().sum()
        kl = kl_estimate(kl_logps, kl_reference)
        ratio_variance = ratio_variance + kl_variance / kl_logps.numel() ** 2
    # From here on (B,) float64 arithmetic: a handful of roundings of the margin and of what becomes of it.
    beta = abs(config.beta)
    margin_spread = beta * ratio_variance.sqrt() + 8 * 2.0**-53 * (1 + logps.detach().abs() * beta)
    leaf = logps.detach().requires_grad_()
    losses = kto_losses(leaf, reference, labels, kl, config)
    loss = reduce_losses(losses, config)
    sent = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    (c,) = torch.autograd.grad(loss, leaf, sent)
    c = c.nan_to_num(0.0)
    # |d sigma / dz| = sigma (1 - sigma), and it changes by no more than its own size: |d log sigma'| <= 1.
    weights = torch.where(labels, config.desirable_weight, config.undesirable_weight).double().abs()
    share = losses.detach() / weights.clamp(min=1e-300)
    loss_spread = weights * share * (1 - share) * margin_spread
    if config.reduction != "none":
        counted = losses.detach().isfinite()
        loss_spread = torch.where(counted, loss_spread, 0.0).square().sum().sqrt()
        loss_spread = loss_spread / (counted.sum() if config.reduction == "mean" else 1)
    out = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    found = {"loss": (loss_spread**2 + (out * loss.detach()) ** 2).sqrt()}
    found["metrics"] = _metric_spreads(inputs, config, logps.detach(), logps_spread, reference, reward_spread, out)
    found |= _gradient_spreads(inputs, config, policy, c, margin_spread, u, wide)
    # The oracle computes in float64 as well: there its errors are as large.
    return {n: s * math.sqrt(2.0) if dtype == torch.float64 else s for n, s in found.items()}


def _metric_spreads(
    inputs: KTOInputs,
    config: KTOConfig,
    logps: Tensor,
    logps_spread: Tensor,
    reference: Tensor | None,
    reward_spread: Tensor,
    out: float,
) -> Tensor:
    wide = _wide(inputs.input.dtype)
    x, w = inputs.input.double().abs().sum(1), inputs.weight.double().abs().sum(0)
    tokens, (vocabulary, hidden) = inputs.target.shape[1], inputs.weight.shape
    # Sums over tokens, over the vocabulary and over the hidden size; the oracle sums B T V logits in one go.
    logits = wide * math.sqrt(tokens + vocabulary) * (x @ w)
    logits = logits + 2.0**-53 * math.sqrt(tokens * vocabulary + hidden) * (x @ w)
    logit_sums = inputs.input.double().sum(1) @ inputs.weight.double().sum(0)
    if inputs.bias is not None:
        logits = logits + 2.0**-53 * math.sqrt(tokens * vocabulary) * tokens * inputs.bias.double().abs().sum()
        logit_sums = logit_sums + tokens * inputs.bias.double().sum()
    rewards = config.beta * (logps if reference is None else logps - reference)
    found = []
    labels = inputs.preference_labels
    # The sums that metrics report are over at most B values in float64, then rounded to the output's dtype.
    for value, spread in ((logps, logps_spread), (logit_sums, logits), (rewards, reward_spread)):
        for chosen in (labels, ~labels):
            size = torch.where(chosen, value.abs(), 0.0).nansum()
            total = torch.where(chosen, value, 0.0).nansum()
            variance = torch.where(chosen, spread, 0.0).square().sum() + (8 * 2.0**-53 * size) ** 2
            found.append((variance + (out * total) ** 2).sqrt())
    return torch.stack(found)


def _gradient_spreads(
    inputs: KTOInputs, config: KTOConfig, policy: _Tokens, c: Tensor, margin_spread: Tensor, u: float, wide: float
) -> dict[str, Tensor]:
    dtype = inputs.input.dtype
    underflow = _UNDERFLOW[dtype]
    x, w = inputs.input.detach().double().flatten(0, 1), inputs.weight.detach().double()
    rows, (vocabulary, _) = x.shape[0], w.shape
    counts = (inputs.target != config.ignore_index).sum(1)
    per_token = c / counts.clamp(min=1) if config.average_log_prob else c
    tokens = inputs.target.shape[1]
    unmasked = (inputs.target != config.ignore_index).flatten()
    c_token = per_token.repeat_interleave(tokens) * unmasked
    # c_t errs with its sequence's margin, and by being rounded to the accumulator; one error for a whole sequence.
    c_spread = (margin_spread.nan_to_num(0.0).repeat_interleave(tokens) + 4 * wide) * c_token.abs()
    residual = policy.residual
    exact = (policy.p * policy.p_spread).square() * unmasked.unsqueeze(1) + (wide * residual) ** 2
    # The slab holds p in the operands' dtype; in float16 times 2**14, so that small ones keep their digits. Targets are
    # not in it: their terms stay in the accumulator.
    scaled_underflow = underflow * (2.0**-14 if dtype == torch.float16 else 1.0)
    others = policy.others
    stored = exact + (u * others) ** 2 + unmasked.unsqueeze(1) * scaled_underflow**2
    c_column, cs_column = c_token.unsqueeze(1), c_spread.unsqueeze(1)

    def rounded(gradient: Tensor, variance: Tensor, terms: int, size: Tensor) -> Tensor:
        """With the product's partial sums in the accumulator and the result's rounding."""
        total = variance + (wide * math.sqrt(terms) * size) ** 2 + (u * gradient) ** 2
        # Where every term is zero (a masked token) nothing rounds.
        return torch.where(size > 0, total + underflow**2, total).sqrt()

    product = residual @ w
    found = {
        "input": rounded(
            c_column * product,
            c_column**2 * (stored @ w**2) + (cs_column * product) ** 2,
            vocabulary,
            c_column.abs() * (residual.abs() @ w.abs()),
        ).view(inputs.input.shape)
    }
    # The other operand, c_t x_t, is rounded too; in float16 scaled by the power of two next above the largest c_t.
    operand = (u * c_column * x) ** 2 + (underflow * 2 * c_token.abs().amax()) ** 2
    found["weight"] = rounded(
        residual.t() @ (c_column * x),
        stored.t() @ (c_column * x) ** 2
        + others.square().t() @ operand
        # The others' sum is rounded before the targets' is added to it.
        + (u * (others.t() @ (c_column * x))) ** 2
        # A sequence's tokens share the error of their c: its terms do not average out.
        + (residual.abs().t() @ (cs_column * x.abs())) ** 2,
        rows,
        residual.abs().t() @ (c_column * x).abs(),
    )
    if inputs.bias is not None:
        found["bias"] = rounded(
            residual.t() @ c_token,
            # It adds up the slab's rounded entries, too, with c_t in the accumulator's dtype.
            stored.t() @ c_token**2 + (residual.abs().t() @ c_spread) ** 2,
            rows,
            residual.abs().t() @ c_token.abs(),
        )
    return found


def objections(actual: Tensor, expected: Tensor, spread: Tensor) -> list[str]:
    """What rounding cannot explain in ``actual``; an empty list where it explains everything.

    Each element is held to Hoeffding's bound, which no right one exceeds; the norm of them all, being a mean over many
    errors, is held to their root mean square, which a small error common to all elements does exceed.
    """
    if actual.shape != expected.shape:
        return [f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"]
    actual, expected = actual.detach().double(), expected.detach().double()
    absent = expected.isnan()
    if bool((actual.isfinite() == absent).any()):
        return ["NaN or infinite where the oracle is not, or the reverse"]
    error, spread = (actual - expected).abs()[~absent], spread.expand(expected.shape)[~absent]
    if error.numel() == 0:
        return []
    found = []
    factor = math.sqrt(2 * math.log(2 * error.numel() / _FALSE_ALARM))
    beyond = error > factor * spread
    if bool(beyond.any()):
        worst = int((error - factor * spread).argmax())
        found.append(
            f"{int(beyond.sum())} of {error.numel()} elements; worst: element {worst}, error "
            f"{float(error[worst]):.3e}, bound {float(factor * spread[worst]):.3e}"
        )
    # A rounding error is about uniform in [-u, u], of mean square u**2 / 3. A norm over n independent ones strays from
    # its root mean square by a share of order 1 / sqrt(n); n is the number of elements that matter.
    norm = float(spread.norm())
    if norm > 0.0:
        effective = (norm / float(spread.max())) ** 2
        bound = norm / math.sqrt(3) * (1 + math.sqrt(2 * math.log(2 / _FALSE_ALARM)) / math.sqrt(effective))
        if float(error.norm()) > bound:
            found.append(f"norm of the error {float(error.norm()):.3e}, bound {bound:.3e}")
    return found
