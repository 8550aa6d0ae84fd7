r"""Rounding errors of log-sum-exp and softmax that are shifted by the largest entry.

Let :math:`t_i = x_i - \max x`, :math:`S = \sum e^{t_i}`, :math:`p_i = e^{t_i} / S` and :math:`y = \max x + \log S`. To
first order in u:

- The shift has an error of :math:`u |t_i|`. It gives :math:`e^{t_i}` an equally large relative error. The library's
  exponential adds a relative error of ``exp_error`` u.
- If each exponential has a relative error :math:`\epsilon_i`, S has the relative error :math:`\sum p_i \epsilon_i`, and
  log S has the same error as an absolute one. The sum adds its own error, see `ktonum.bounds.summation`. All terms of
  this sum are positive.
- Where a running sum stagnates, small exponentials are lost. This loss does not average out.
- The library's logarithm has an error of ``log_error`` u |log S|, and the last addition one of u |y|.
- The relative error of :math:`p_i` is made of the error of its own exponential, the error of S, and u for the division.

These bounds are derived here. The order of the sum and the errors of the library's functions are parameters. Blanchard,
Higham and Higham (2021, IMA J. Numer. Anal. 41(4), 2311) analyse the same algorithms and conclude that the shift costs
no accuracy. The constants of their theorems are not used, because their text was not available for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.bounds.constants import gamma
from ktonum.bounds.summation import Order, stagnation_bias, sum_amplitude

__all__ = ["FUNCTION_BIAS", "FUNCTION_ERROR", "ShiftedExponentials"]

#: Largest relative error of exp and log in units of u: one unit in the last place, which is at most 2 u. torch's CPU
#: library stays within it in float32 and float64 (``tests/bounds/test_exponentials.py``). Pass the errors of others.
FUNCTION_ERROR = 2.0
#: The part of that error that need not average out over the arguments, in units of u. A function's error depends on its
#: argument, not on chance. A sigmoid made of the GPU's approximate exponential and quotient has 0.08 u: Liger-Kernel's
#: SwiGLU in float32 on an H100 has a signed bias of 4.7e-9 (benchmarks/results/h100-ready-ops.txt). Three times that
#: leaves room for other functions.
FUNCTION_BIAS = 0.25


@dataclass(frozen=True)
class ShiftedExponentials:
    """Rows of numbers whose exponentials are summed.

    Attributes:
        entries: (…, n), float64: the numbers that the implementation reads.
        order: The order in which each row's exponentials are added.
        roundoff: u of the arithmetic.
        exp_error, log_error: Largest relative errors of the library's functions, in units of u.
    """

    entries: Tensor
    order: Order
    roundoff: float
    exp_error: float = FUNCTION_ERROR
    log_error: float = FUNCTION_ERROR

    def logsumexp_bound(self) -> Tensor:
        """Deterministic bound on the error of y, to first order in u; (…)."""
        shifted, p, log_sum = self._parts()
        own = self.roundoff * (p * (shifted.abs() + self.exp_error)).sum(-1)
        rest = self.roundoff * (self.log_error * log_sum + self._y(log_sum).abs())
        return own + gamma(self.order.depth(p.shape[-1]), self.roundoff) + rest

    def logsumexp_errors(self) -> tuple[Tensor, Tensor]:
        """(amplitude, coherent part) of the error of y if rounding errors are independent with mean zero; (…) each."""
        shifted, p, log_sum = self._parts()
        own = self._own(shifted)
        rest = (self.log_error * log_sum).square() + self._y(log_sum).square()
        amplitude = (self._of_sum(p, own) + self.roundoff**2 * rest).sqrt()
        return amplitude, stagnation_bias(p, self.order, self.roundoff)

    def softmax_bound(self) -> Tensor:
        """Deterministic bound on the absolute error of each p, to first order in u; (…, n)."""
        shifted, p, _ = self._parts()
        own = self.roundoff * (shifted.abs() + self.exp_error)
        of_sum = (p * own).sum(-1, keepdim=True) + gamma(self.order.depth(p.shape[-1]), self.roundoff)
        return p * (own + of_sum + self.roundoff)

    def softmax_errors(self) -> tuple[Tensor, Tensor]:
        """(amplitude, coherent part) of the absolute error of each p; (…, n) each.

        The amplitude includes the error of the sum, which all elements of a row share.
        """
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
        """Variance of the relative error of each exponential, (…, n)."""
        return self.roundoff**2 * (shifted.square() + self.exp_error**2)

    def _of_sum(self, p: Tensor, own: Tensor) -> Tensor:
        """Variance of the relative error of S, (…)."""
        squares = p.square()
        added = sum_amplitude(torch.ones_like(p[..., 0]), squares.sum(-1), p.shape[-1], self.order, self.roundoff)
        return (squares * own).sum(-1) + added.square()
