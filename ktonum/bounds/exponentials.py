r"""Rounding errors of log-sum-exp and softmax, shifted by the largest entry.

With :math:`t_i = x_i - \max x`, :math:`S = \sum e^{t_i}`, :math:`p_i = e^{t_i} / S` and the result
:math:`y = \max x + \log S`, to first order in u:

- the shift errs by :math:`u |t_i|`, which :math:`e^{t}` turns into as large a relative error; the library's exponential
  adds e u;
- an error :math:`\epsilon_i` relative to each exponential is :math:`\sum p_i \epsilon_i` relative to S, and as much
  absolute in log S. The sum adds its own, see `ktonum.bounds.summation`: all its terms are positive;
- small exponentials are lost where a running sum stagnates: a share of S that does not average out;
- the library's logarithm errs by e u |log S|, the last addition by u |y|;
- :math:`p_i` errs by its own exponential's error, by that of S, and by the division's u.

Derived here, with the sum's order and the library's functions as parameters. The algorithms are those that Blanchard,
Higham and Higham analyse (2021, IMA J. Numer. Anal. 41(4), 2311), and the conclusion is theirs, that shifting costs no
accuracy; the constants of their theorems are not used, for no text of them was at hand to check.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.bounds.constants import gamma
from ktonum.bounds.summation import Order, stagnation_bias, sum_amplitude

__all__ = ["FUNCTION_BIAS", "FUNCTION_ERROR", "ShiftedExponentials"]

#: Error of exp and log in units of u: one unit in the last place, which is 2 u at most. What torch's CPU library keeps
#: to in float32 and float64 (``tests/bounds/test_exponentials.py`` measures it). Of others, pass theirs.
FUNCTION_ERROR = 2.0
#: What of it need not average out over arguments, in units of u: a function's error is no matter of chance. Of a
#: sigmoid by the GPU's approximate exponential and quotient it is 0.08 u: Liger-Kernel's SwiGLU in float32 on an H100
#: is 4.7e-9 too long over 1.2e8 elements (benchmarks/results/h100-ready-ops.txt). Three times that, for others.
FUNCTION_BIAS = 0.25


@dataclass(frozen=True)
class ShiftedExponentials:
    """Rows of numbers whose exponentials are summed.

    Attributes:
        entries: (…, n), float64: the numbers as the implementation sees them.
        order: How each row's exponentials are added.
        roundoff: u of the arithmetic.
        exp_error, log_error: Of the library's functions, in units of u.
    """

    entries: Tensor
    order: Order
    roundoff: float
    exp_error: float = FUNCTION_ERROR
    log_error: float = FUNCTION_ERROR

    def logsumexp_bound(self) -> Tensor:
        """Deterministic bound on y's error, to first order, (…)."""
        shifted, p, log_sum = self._parts()
        own = self.roundoff * (p * (shifted.abs() + self.exp_error)).sum(-1)
        rest = self.roundoff * (self.log_error * log_sum + self._y(log_sum).abs())
        return own + gamma(self.order.depth(p.shape[-1]), self.roundoff) + rest

    def logsumexp_errors(self) -> tuple[Tensor, Tensor]:
        """(amplitude, coherent part) of y's error, the errors independent with mean zero, (…) each."""
        shifted, p, log_sum = self._parts()
        own = self._own(shifted)
        rest = (self.log_error * log_sum).square() + self._y(log_sum).square()
        amplitude = (self._of_sum(p, own) + self.roundoff**2 * rest).sqrt()
        return amplitude, stagnation_bias(p, self.order, self.roundoff)

    def softmax_bound(self) -> Tensor:
        """Deterministic bound on each p's error, to first order, (…, n)."""
        shifted, p, _ = self._parts()
        own = self.roundoff * (shifted.abs() + self.exp_error)
        of_sum = (p * own).sum(-1, keepdim=True) + gamma(self.order.depth(p.shape[-1]), self.roundoff)
        return p * (own + of_sum + self.roundoff)

    def softmax_errors(self) -> tuple[Tensor, Tensor]:
        """(amplitude, coherent part) of each p's error, (…, n) each. The sum's share is common to a row."""
        shifted, p, _ = self._parts()
        own = self._own(shifted)
        amplitude = p * (own + self._of_sum(p, own).unsqueeze(-1) + self.roundoff**2).sqrt()
        return amplitude, p * stagnation_bias(p, self.order, self.roundoff).unsqueeze(-1)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """t, p and log S."""
        shifted = self.entries - self.entries.amax(-1, keepdim=True)
        return shifted, shifted.softmax(-1), shifted.logsumexp(-1)

    def _y(self, log_sum: Tensor) -> Tensor:
        return self.entries.amax(-1) + log_sum

    def _own(self, shifted: Tensor) -> Tensor:
        """Variance of each exponential, relative to it."""
        return self.roundoff**2 * (shifted.square() + self.exp_error**2)

    def _of_sum(self, p: Tensor, own: Tensor) -> Tensor:
        """Variance of S, relative to it."""
        squares = p.square()
        added = sum_amplitude(torch.ones_like(p[..., 0]), squares.sum(-1), p.shape[-1], self.order, self.roundoff)
        return (squares * own).sum(-1) + added.square()
