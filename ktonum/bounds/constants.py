r"""How far a product of n factors :math:`1 + \delta` can be from one: a certain bound and a probable bound.

Every bound on a sum uses them, because n roundings multiply a term by :math:`\prod_{i \le n} (1 + \delta_i)`, with
:math:`|\delta_i| \le u`.
"""

from __future__ import annotations

import math

from ktonum.errors import InputError

__all__ = ["FALSE_ALARM", "confidence", "gamma", "probabilistic_gamma"]

#: The probability that one measure raises a false alarm on a correct op, under the model of `probabilistic_gamma`.
FALSE_ALARM = 1e-6


def confidence(tests: int = 1, false_alarm: float = FALSE_ALARM) -> float:
    """The λ for which 2 exp(−λ²/2) = ``false_alarm`` / ``tests``: Hoeffding's inequality and a union bound.

    Args:
        tests: How many statements must hold together; 0 counts as 1.
        false_alarm: The probability that at least one of them fails although the model holds.
    """
    return math.sqrt(2.0 * math.log(2.0 * max(1, tests) / false_alarm))


def gamma(roundings: int, roundoff: float) -> float:
    r""":math:`\gamma_n = n u / (1 - n u)`: no product of n factors is further from one, whatever the errors are.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, Lemma 3.1. It holds because :math:`(1 + u)^n - 1 \le
    e^{n u} - 1 \le n u / (1 - n u)` and :math:`1 - (1 - u)^n \le n u`.

    Args:
        roundings: n, 0 or more.
        roundoff: u, between 0 and 1.

    Raises:
        InputError: n or u is out of range, or n u is 1 or more.
    """
    _check(roundings, roundoff)
    if roundings * roundoff >= 1:
        raise InputError(
            f"{roundings} roundings of u = {roundoff:g}: n u must be below 1; use probabilistic_gamma, "
            f"a finer accumulator, or an order with fewer roundings for each term"
        )
    return roundings * roundoff / (1 - roundings * roundoff)


def probabilistic_gamma(roundings: int, roundoff: float, confidence: float) -> float:
    r""":math:`\exp(\lambda \sqrt{n} u + n u^2 / (2 (1 - u))) - 1`: a bound that holds with a stated probability.

    It bounds the same distance as `gamma`, with a probability of at least 1 − 2 exp(−λ²/2). It assumes that the errors
    are independent and have mean zero. This is the model of Higham and Mary (2019, SIAM J. Sci. Comput. 41(5), A2815).
    The constant is derived here. It was not compared with theirs, because their text was not available.

    Derivation: :math:`|\log(1 + \delta) - \delta| \le u^2 / (2 (1 - u))`, so the logarithm of the product P differs
    from :math:`\sum \delta_i` by at most n times that. By Hoeffding's inequality, :math:`|\sum \delta_i|` exceeds
    :math:`\lambda \sqrt{n} u` with a probability of at most :math:`2 \exp(-\lambda^2 / 2)`. If :math:`|\log P| \le b`,
    then :math:`|P - 1| \le e^b - 1`.

    Args:
        roundings: n, 0 or more.
        roundoff: u, between 0 and 1.
        confidence: λ, see `confidence`. Choose it for all terms of all sums that one statement is about.

    Raises:
        InputError: n or u is out of range.
    """
    _check(roundings, roundoff)
    return math.expm1(confidence * math.sqrt(roundings) * roundoff + roundings * roundoff**2 / (2 * (1 - roundoff)))


def _check(roundings: int, roundoff: float) -> None:
    if roundings < 0 or not 0 < roundoff < 1:
        raise InputError(
            f"{roundings} roundings of u = {roundoff!r}: pass a count of 0 or more, and a unit roundoff between 0 and "
            f"1, such as ktonum.bounds.FP32.unit_roundoff"
        )
