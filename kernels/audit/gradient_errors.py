"""Bounds on the errors of the gradients; formulas in `kto_error_model.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, amplitude, confidence, subnormal_rounding, summation_variance, unit_roundoff
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation
from ktonum.kernels.audit.logit_errors import ScoredTokens, analysed_tokens
from ktonum.kernels.contract.config import KTOConfig

__all__ = ["gradient_bounds"]

# What is summed over tokens, and over sequences.
_SUMS = ("variance", "coherent", "own", "rises", "softmax", "softmax rises", "sequence", "sequence softmax")


def gradient_bounds(
    head: ScoredTokens,
    config: KTOConfig,
    arithmetic: Arithmetic,
    oracle: Evaluation,
    coefficients: Tensor,
    own: Tensor,
    shared: Tensor,
) -> dict[str, DerivedErrors]:
    """Bounds for grad_input, grad_weight and grad_bias; ``own`` and ``shared`` are relative errors of c_i, (B,)."""
    work = torch.float32 if head.input.is_cuda else torch.float64
    device = head.input.device
    weight = head.weight.to(work)
    squared_weight = weight.square()
    vocabulary, hidden = weight.shape
    rows = int((head.target != config.ignore_index).sum())
    operand = unit_roundoff(arithmetic.operands) ** 2
    # Half the spacing of subnormals: a stored c e_tv errs by as much. Relative to u, as `squares` are.
    underflow = subnormal_rounding(arithmetic.stored) ** 2 / operand
    u = unit_roundoff(arithmetic.accumulator)
    scattered = u**2 * rows / 6  # what `summation_variance` allows for the squares of the terms
    input_variance = torch.zeros(head.input.shape, dtype=work, device=device)
    input_coherent = torch.zeros_like(input_variance)
    # Sums over tokens: with x for the weight, and with 1 in the place of x for the bias.
    x_sums = {k: torch.zeros(vocabulary, hidden, dtype=work, device=device) for k in _SUMS}
    b_sums = {k: torch.zeros(vocabulary, dtype=work, device=device) for k in _SUMS}
    sequence = 0

    def close_sequence() -> None:
        for sums in (x_sums, b_sums):
            total, softmax = sums["sequence"], sums["sequence softmax"]
            # The error of c_i multiplies the sequence's whole part, so it does not average out over the elements.
            sums["own"].addcmul_(total, total, value=float(own[sequence] ** 2))
            sums["coherent"].add_(total.abs(), alpha=float(shared[sequence]))
            sums["rises"].add_(total.clamp(min=0))
            sums["softmax rises"].add_(softmax.clamp(min=0))
            sums["softmax"].add_(softmax)
            total.zero_()
            softmax.zero_()

    for chunk in analysed_tokens(head, config.ignore_index, arithmetic):
        if chunk.sequence != sequence:
            close_sequence()
            sequence = chunk.sequence
        c = coefficients[sequence, chunk.rows].to(work).unsqueeze(1)
        e = -chunk.p
        e.scatter_add_(1, chunk.y.unsqueeze(1), torch.ones_like(c))
        # Not by `torch.where` of two Python numbers: these are float32, and this one is smaller than float32's
        # smallest.
        squares = (c * e).square() + underflow * chunk.unmasked.to(work).unsqueeze(1)
        p_variance = (c * chunk.p).square() * chunk.variance
        x2 = chunk.x.square()
        gradient = c * (e @ weight)
        expected_weight = c * weight[chunk.y] - gradient  # c Σ_v p_v w_v, the sum before the target's term
        partial = torch.maximum(gradient.abs(), expected_weight.abs())
        roundings = squares @ squared_weight
        input_variance[sequence, chunk.rows] = (
            operand * roundings
            + p_variance @ squared_weight
            + summation_variance(vocabulary, partial, roundings, arithmetic.accumulator)
        )
        input_coherent[sequence, chunk.rows] = (
            3 * chunk.logsumexp_variance.sqrt().unsqueeze(1) * expected_weight.abs()
            + (3 * own[sequence] + shared[sequence] + arithmetic.truncation(vocabulary)) * gradient.abs()
        )
        p_variance += (c * chunk.p).square() * chunk.logsumexp_variance.unsqueeze(1)
        # The products for the weight round both operands, the sum for the bias one.
        x_sums["variance"] += (p_variance + (2 * operand + scattered) * squares).T @ x2
        b_sums["variance"] += (p_variance + (operand + scattered) * squares).sum(0)
        x_sums["sequence"].addmm_((c * e).T, chunk.x)
        b_sums["sequence"].add_((c * e).sum(0))
        x_sums["sequence softmax"].addmm_((c * chunk.p).T, chunk.x)
        b_sums["sequence softmax"].add_((c * chunk.p).sum(0))
    close_sequence()
    for sums in (x_sums, b_sums):
        sums["coherent"].add_(sums["own"].sqrt(), alpha=confidence())

    def accumulated(total: Tensor, rises: Tensor) -> Tensor:
        # Sequences pull either way. All that pull one way may have been added before the others.
        peak = torch.maximum(rises, rises - total)
        return summation_variance(rows, total, torch.zeros_like(total), arithmetic.accumulator, peak=peak)

    def assembled(name: str, sums: Mapping[str, Tensor]) -> DerivedErrors:
        exact = oracle.gradients[name]
        assert exact is not None  # called only if the oracle has this gradient
        total = exact.to(work)
        # If the targets' terms are added last, the sum before them is the softmax's part alone.
        of_softmax = accumulated(sums["softmax"], sums["softmax rises"])
        variance = sums["variance"] + torch.maximum(accumulated(total, sums["rises"]), of_softmax)
        coherent = sums["coherent"] + (arithmetic.truncation(rows) + u) * total.abs()
        return DerivedErrors(amplitude(variance), coherent)

    bounds = {}
    if oracle.gradients.get("input") is not None:
        bounds["grad_input"] = DerivedErrors(amplitude(input_variance), input_coherent)
    if oracle.gradients.get("weight") is not None:
        bounds["grad_weight"] = assembled("weight", x_sums)
    if oracle.gradients.get("bias") is not None:
        bounds["grad_bias"] = assembled("bias", b_sums)
    return bounds
