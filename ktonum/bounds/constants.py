r"""How far products of many :math:`1 + \delta` are from one, for certain and with a stated probability.

Every bound of a sum is made of these: a term that takes part in n roundings comes out multiplied by
:math:`\prod_{i \le n} (1 + \delta_i)`, :math:`|\delta_i| \le u`.
"""

from __future__ import annotations

import math

from ktonum.errors import InputError

__all__ = ["FALSE_ALARM", "confidence", "gamma", "probabilistic_gamma"]

#: Probability, by the model of `probabilistic_gamma`, that one measure raises a false alarm on a correct op.
FALSE_ALARM = 1e-6


def confidence(tests: int = 1, false_alarm: float = FALSE_ALARM) -> float:
    """λ with 2 exp(−λ²/2) = ``false_alarm`` / ``tests``: Hoeffding's inequality with a union bound over the tests."""
    return math.sqrt(2.0 * math.log(2.0 * max(1, tests) / false_alarm))


def gamma(roundings: int, roundoff: float) -> float:
    r""":math:`\gamma_n = n u / (1 - n u)`: the product of n factors is no further from one, whatever the errors.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, Lemma 3.1. It holds since :math:`(1 + u)^n - 1 \le
    e^{n u} - 1 \le n u / (1 - n u)`, and :math:`1 - (1 - u)^n \le n u`.

    Raises:
        InputError: n u is 1 or more: nothing is left to bound.
    """
    _check(roundings, roundoff)
    if roundings * roundoff >= 1:
        raise InputError(
            f"{roundings} roundings of u = {roundoff:g} leave no digit: n u must be below 1; use probabilistic_gamma, "
            f"a finer accumulator, or an order with fewer roundings a term"
        )
    return roundings * roundoff / (1 - roundings * roundoff)


def probabilistic_gamma(roundings: int, roundoff: float, confidence: float) -> float:
    r""":math:`\exp(\lambda \sqrt{n} u + n u^2 / (2 (1 - u))) - 1`: the same with probability 1 − 2 exp(−λ²/2).

    Assumes that the errors are independent and have mean zero, which is Higham and Mary's model (2019, SIAM J. Sci.
    Comput. 41(5), A2815). The constant is derived here and not theirs, of which no text was at hand to check:
    :math:`|\log(1 + \delta) - \delta| \le u^2 / (2 (1 - u))`, so the product's logarithm is within n times that of
    :math:`\sum \delta_i`, and by Hoeffding's inequality that sum exceeds :math:`\lambda \sqrt{n} u` with probability
    :math:`2 \exp(-\lambda^2 / 2)` at most. With :math:`|\log P| \le b`, P is within :math:`e^b - 1` of one.

    Args:
        roundings: n.
        roundoff: u.
        confidence: λ, see `confidence`; over all terms of all sums that one statement is to hold for.
    """
    _check(roundings, roundoff)
    return math.expm1(confidence * math.sqrt(roundings) * roundoff + roundings * roundoff**2 / (2 * (1 - roundoff)))


def _check(roundings: int, roundoff: float) -> None:
    if roundings < 0 or not 0 < roundoff < 1:
        raise InputError(
            f"{roundings} roundings of u = {roundoff!r}: pass a count of 0 or more, and a unit roundoff between 0 and "
            f"1, such as ktonum.bounds.FP32.unit_roundoff"
        )
