r"""Rounding-error analysis of softmax cross-entropy, for losses on given logits and on projected ones.

With :math:`\ell` the log-sum-exp, p the softmax, q the smoothed target, and :math:`e = p - q` of a row, u the
accumulator's and s the stored dtype's roundoff:

- an exponential errs by its argument's rounding and the logit's own error, relative to itself;
- :math:`\mathrm{var}\,\ell = \sum_v p_v^2 (\alpha_v^2 + u^2 (2 + |z_v - \ell|)^2) + u^2 (V/3 + \ell^2)`, the sum of V
  positive numbers added one by one;
- a row's loss errs by that, by its target's logit, and by what `eager` stores: the log-probabilities;
- :math:`\partial z_v = c e_v` errs in each p_v on its own, and by the row's :math:`\ell` in all of them alike;
- under `eager`, autograd of a smoothed loss stores c q_v, one number for all classes but the target's. Among subnormals
  its rounding is up to :math:`\delta = \min(\eta, c q_v)`, :math:`\eta` half their spacing, the same for all of
  them; their sum errs by V δ and comes back times p_v. In float16 errors were up to 1.7 times the bound without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, subnormal_rounding, unit_roundoff

__all__ = ["LabelledRows", "loss_bounds"]


@dataclass(frozen=True)
class LabelledRows:
    """Rows of logits with their labels, all float64.

    Attributes:
        logits: (N, V).
        variance: The logits' own errors, squared amplitudes, (N, V).
        counted: Rows that have a loss, (N,).
        target: q, (N, V): what the softmax should be; zero in rows that are not counted.
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
        """Of ℓ, (N, 1); `eager` stores the exponentials, their sum S, and log S."""
        u, s = unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored)
        p, logsumexp = self.logits.softmax(-1), self.logsumexp
        own = self.variance + (u * (2 + (self.logits - logsumexp).abs())).square()
        classes = self.logits.shape[1]
        log_sum = logsumexp - self.logits.amax(-1, keepdim=True)
        stored = s**2 * (p.square().sum(-1, keepdim=True) + 1 + log_sum.square())
        return (p.square() * own).sum(-1, keepdim=True) + u**2 * (classes / 3 + logsumexp.square()) + stored

    def probability_variance(self, arithmetic: Arithmetic) -> Tensor:
        """Of each p, relative to it, (N, V), apart from ℓ's."""
        u = unit_roundoff(arithmetic.accumulator)
        distance = (self.logits - self.logsumexp).abs()
        own = self.variance + (u * (2 + distance)).square()
        if arithmetic.stored != arithmetic.accumulator:
            own = own + (unit_roundoff(arithmetic.stored) * distance).square()
        return own

    def smoothing_underflow(self, arithmetic: Arithmetic) -> Tensor:
        """δ, (N, 1): what the stored c q_v of all classes but the target's may lose among subnormals, all alike."""
        stored = self.coefficients.abs().unsqueeze(1) * self.smoothing / self.logits.shape[1]
        return stored.clamp(max=subnormal_rounding(arithmetic.stored))


def loss_bounds(rows: LabelledRows, arithmetic: Arithmetic) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(independent, coherent) bounds for the output and for the logits' gradient, see `ktonum.bounds.ErrorBound`."""
    u, s = unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored)
    distance = (rows.logits - rows.logsumexp).abs()
    shared = rows.logsumexp_variance(arithmetic)[:, 0]
    losses = (rows.target * distance).sum(-1)
    # The smoothed mean adds V numbers of one sign.
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
    # In float64: a boolean would make it float32, in which float32's own is zero.
    independent = independent + underflow * (c > 0).to(c.dtype)
    # Where p is far below q, elements are nearly c q, one number for many, and their last rounding is one as well.
    alike = unit_roundoff(arithmetic.operands) * rows.target
    coherent = c * (3 * shared.sqrt().unsqueeze(1) * p + 2 * s * (p + rows.target) + alike)
    # δ (1 + V p_v)
    coherent = coherent + rows.smoothing_underflow(arithmetic) * (1 + rows.logits.shape[1] * p)
    output = variance.sqrt()
    return (output, torch.zeros_like(output)), (independent, coherent)
