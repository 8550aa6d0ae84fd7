"""Errors of logits, of tokens' log-probabilities and of their sums over sequences; formulas in `kto_error_model.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, summation_variance, unit_roundoff
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.formula import sequence_means

__all__ = ["IN_SEQUENCE", "ScoredTokens", "SequenceErrors", "TokenErrors", "analysed_sequences", "analysed_tokens"]

# How many logits are analysed at a time. Half a dozen buffers of this many numbers are alive at once.
_LOGITS_AT_ONCE = 2**26
#: How many entries of the softmax's denominator, or logits of a metric, an implementation may add one by one in the
#: accumulator's dtype. Of more than these it is expected to add partial sums.
IN_SEQUENCE = 1024


@dataclass(frozen=True)
class ScoredTokens:
    """A projection to logits and the tokens it scores."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class SequenceErrors:
    """The analysis of each sequence, (B,), float64.

    Attributes:
        logps: Log-probability.
        variance: Of its error.
        shift: Σ (z_y − E_p z) over unmasked tokens.
        logit_sum, logit_squares, logit_variance: Σ z, Σ z² and Σ α_z² over all tokens.
    """

    logps: Tensor
    variance: Tensor
    shift: Tensor
    logit_sum: Tensor
    logit_squares: Tensor
    logit_variance: Tensor


@dataclass(frozen=True)
class TokenErrors:
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


def analysed_tokens(head: ScoredTokens, ignore_index: int, arithmetic: Arithmetic) -> Iterator[TokenErrors]:
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
            # Σ_v exp(z_v − m) is added up in stretches. Each exponential also errs by the rounding of its argument.
            adding = min(vocabulary, IN_SEQUENCE) / 3 + vocabulary / IN_SEQUENCE / 3
            logsumexp = logits.logsumexp(-1, keepdim=True)
            argument = (p * (2 + (logits - logsumexp).abs())).square().sum(-1)
            logsumexp_variance = (p.square() * variance).sum(-1) + u**2 * (adding + argument + logsumexp.square()[:, 0])
            unmasked = y != ignore_index
            y = torch.where(unmasked, y, 0)
            yield TokenErrors(i, rows, x, y, unmasked, logits, p, variance, logsumexp_variance)


def analysed_sequences(head: ScoredTokens, config: KTOConfig, arithmetic: Arithmetic) -> SequenceErrors:
    batch, tokens, _ = head.input.shape
    sums = torch.zeros(6, batch, dtype=torch.float64, device=head.input.device)
    u = unit_roundoff(arithmetic.accumulator)
    for chunk in analysed_tokens(head, config.ignore_index, arithmetic):
        at = chunk.y.unsqueeze(1)
        z_y = chunk.logits.gather(1, at)[:, 0]
        logps = z_y - chunk.logits.logsumexp(-1)
        variance = chunk.variance.gather(1, at)[:, 0] + chunk.logsumexp_variance + (u * logps).square()
        shift = z_y - (chunk.p * chunk.logits).sum(-1)
        masked = [torch.where(chunk.unmasked, v, 0.0).sum() for v in (logps, variance, shift)]
        every = [chunk.logits.sum(), chunk.logits.square().sum(), chunk.variance.sum()]
        sums[:, chunk.sequence] += torch.stack([v.double() for v in (*masked, *every)])
    logps, variance, shift, *logits = sums
    counts = (head.target != config.ignore_index).sum(1)
    variance = variance + (u * logps).square() * (1 + math.log2(max(2, tokens)))
    if config.average_log_prob:
        logps = sequence_means(logps, counts, config)
        variance, shift = variance / counts.clamp(min=1) ** 2, shift / counts.clamp(min=1)
    return SequenceErrors(logps, variance, shift, *logits)
