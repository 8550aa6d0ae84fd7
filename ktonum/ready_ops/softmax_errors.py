r"""Rounding-error analysis of softmax cross-entropy, for losses of given logits and of logits from a projection.

For a row, let z be the logits, :math:`\alpha_v` the amplitude of the error of :math:`z_v`, :math:`\ell` the
log-sum-exp, p the softmax, q the smoothed target, :math:`e = p - q`, and c the upstream gradient of the row's loss. Let
u be the roundoff of the accumulator and s that of the stored dtype.

- The relative error of an exponential is the rounding error of its argument plus the logit's own error.
- :math:`\mathrm{var}\,\ell = \sum_v p_v^2 (\alpha_v^2 + u^2 (2 + |z_v - \ell|)^2) + u^2 (V/3 + \ell^2)`. The term V/3
  comes from V positive numbers that are added one by one.
- A row's loss has this error, the error of its target's logit, and under `eager` the roundings of the stored
  log-probabilities.
- In :math:`\partial z_v = c e_v`, each :math:`p_v` has an error of its own, and all of them share the error of
  :math:`\ell`.
- Under `eager`, autograd of a smoothed loss stores c q_v, which is one number for all classes except the target. If it
  is subnormal, its rounding error is up to :math:`\delta = \min(\eta, c q_v)`, with :math:`\eta` half the spacing of
  subnormals. All these classes have the same error. Their sum has the error V δ, which :math:`p_v` then multiplies. In
  float16, errors were up to 1.7 times the bound without this term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, subnormal_rounding, unit_roundoff
from ktonum.declare.error_model import DerivedErrors

__all__ = ["LabelledRows", "loss_errors"]


@dataclass(frozen=True)
class LabelledRows:
    """Rows of logits with their labels, all float64.

    Attributes:
        logits: z, (N, V).
        variance: α², the squared amplitudes of the logits' own errors, (N, V).
        counted: True for rows that have a loss, (N,), bool.
        target: q, the smoothed target of the softmax, (N, V); zero in rows that are not counted.
        coefficients: ∂ Σ⟨upstream, output⟩ / ∂ loss_i, (N,); zero in rows that are not counted.
        smoothing: The label smoothing.
        reduction: ``mean``, ``sum`` or ``none``.
    """

    logits: Tensor
    variance: Tensor
    counted: Tensor
    target: Tensor
    coefficients: Tensor
    smoothing: float
    reduction: str

    @classmethod
    def of(
        cls, logits: Tensor, variance: Tensor, labels: Tensor, upstream: Tensor, parameters: Mapping[str, Any]
    ) -> LabelledRows:
        """The rows of a loss with the parameters ``ignore_index``, ``label_smoothing`` and ``reduction``."""
        smoothing, reduction = parameters.get("label_smoothing", 0.0), parameters.get("reduction", "mean")
        counted = labels != parameters.get("ignore_index", -100)
        target = torch.full_like(logits, smoothing / logits.shape[1])
        index = torch.where(counted, labels, 0).unsqueeze(1)
        target.scatter_add_(1, index, torch.full_like(target[:, :1], 1 - smoothing))
        target *= counted.unsqueeze(1)
        share = upstream.double() / (counted.sum() if reduction == "mean" else 1)
        coefficients = torch.where(counted, share.expand(counted.shape), 0.0)
        return cls(logits, variance, counted, target, coefficients, smoothing, reduction)

    @property
    def logsumexp(self) -> Tensor:
        """ℓ, (N, 1)."""
        return self.logits.logsumexp(-1, keepdim=True)

    @property
    def error(self) -> Tensor:
        """c e = c (p − q), (N, V): the exact gradient."""
        return self.coefficients.unsqueeze(1) * (self.logits.softmax(-1) - self.target)

    def logsumexp_variance(self, arithmetic: Arithmetic) -> Tensor:
        """The variance of ℓ, (N, 1). `eager` also rounds the exponentials, their sum S, and log S."""
        u, s = unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored)
        p, logsumexp = self.logits.softmax(-1), self.logsumexp
        own = self.variance + (u * (2 + (self.logits - logsumexp).abs())).square()
        classes = self.logits.shape[1]
        log_sum = logsumexp - self.logits.amax(-1, keepdim=True)
        stored = s**2 * (p.square().sum(-1, keepdim=True) + 1 + log_sum.square())
        return (p.square() * own).sum(-1, keepdim=True) + u**2 * (classes / 3 + logsumexp.square()) + stored

    def probability_variance(self, arithmetic: Arithmetic) -> Tensor:
        """The variance of the relative error of each p, without the error of ℓ; (N, V)."""
        u = unit_roundoff(arithmetic.accumulator)
        distance = (self.logits - self.logsumexp).abs()
        own = self.variance + (u * (2 + distance)).square()
        if arithmetic.stored != arithmetic.accumulator:
            own = own + (unit_roundoff(arithmetic.stored) * distance).square()
        return own

    def smoothing_underflow(self, arithmetic: Arithmetic) -> Tensor:
        """δ, (N, 1): the error among subnormals of the stored c q_v, which all classes except the target share."""
        stored = self.coefficients.abs().unsqueeze(1) * self.smoothing / self.logits.shape[1]
        return stored.clamp(max=subnormal_rounding(arithmetic.stored))


def loss_errors(rows: LabelledRows, arithmetic: Arithmetic) -> tuple[DerivedErrors, DerivedErrors]:
    """Errors of the output, and of the logits' gradient."""
    u, s = unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored)
    distance = (rows.logits - rows.logsumexp).abs()
    shared = rows.logsumexp_variance(arithmetic)[:, 0]
    losses = (rows.target * distance).sum(-1)
    # The mean of label smoothing adds V numbers of one sign.
    adding = u**2 * rows.logits.shape[1] / 3 * (rows.smoothing * distance.mean(-1)).square()
    own = (
        (rows.target.square() * (rows.variance + (s * distance).square())).sum(-1) + adding + (2 * s * losses).square()
    )
    variance = torch.where(rows.counted, shared + own, 0.0)
    if rows.reduction != "none":
        count = int(rows.counted.sum())
        divisor = count if rows.reduction == "mean" else 1
        total = losses.sum()
        variance = (variance.sum() + u**2 * count / 3 * total.square()) / divisor**2 + (
            2 * s * total / divisor
        ).square()
    p, c = rows.logits.softmax(-1), rows.coefficients.abs().unsqueeze(1)
    underflow = subnormal_rounding(arithmetic.stored)
    independent = c * p * rows.probability_variance(arithmetic).sqrt() + 3 * s * rows.error.abs()
    # Convert the boolean to float64. The product would be float32 otherwise, and zero if ``underflow`` is float32's.
    independent = independent + underflow * (c > 0).to(c.dtype)
    # If p is far below q, many elements are nearly c q, which is one number. So their last roundings are the same.
    alike = unit_roundoff(arithmetic.operands) * rows.target
    coherent = c * (3 * shared.sqrt().unsqueeze(1) * p + 2 * s * (p + rows.target) + alike)
    # δ (1 + V p_v)
    coherent = coherent + rows.smoothing_underflow(arithmetic) * (1 + rows.logits.shape[1] * p)
    output = variance.sqrt()
    return DerivedErrors(output, torch.zeros_like(output)), DerivedErrors(independent, coherent)
