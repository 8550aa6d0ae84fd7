r"""The tail of a sample of errors, and the tolerance that few right results exceed.

What exceeds a high threshold follows a generalized Pareto distribution with shape ξ and scale σ, nearly, whatever the
errors' own distribution (Balkema and de Haan 1974; Pickands 1975, Ann. Statist. 3(1), 119; Coles 2001, An Introduction
to Statistical Modeling of Extreme Values, chapter 4). Here the threshold is an order statistic, ξ and σ come from
probability-weighted moments (Hosking and Wallis 1987, Technometrics 29(3), 339), which are steadier than maximum
likelihood for samples of this size, and how well the distribution fits is told by the Anderson–Darling statistic, its
p-value from samples of the fitted distribution that are fitted in turn (Stute, González Manteiga and Presedo Quindimil
1993, Metrika 40, 243).

A tolerance for one false alarm in a million extrapolates far beyond a sample of hundreds. Three things are done for it
to err on the loose side, and never beyond the derived bound:

- Rounding errors have an end, and most samples show it: ξ < 0. Where that end is the sample hardly knows. So the
  tolerance takes the 99 % upper confidence limit of ξ, raised by what makes a normal tail's fit look as if it ended,
  and no more than ξ = 0, the exponential tail; and the same limit of the mean excess m, exact where ξ is 0:
  :math:`t = u + m (1 - ξ) ((α / ζs)^{-ξ} - 1) / ξ`, ζ the share of errors beyond the threshold u, α the budget.
- A sample is made of strata: a point and a candidate each. Were all that exceed from one of s equal strata, its rate
  would be s times the mean: α is divided by s.
- Where ξ is above zero by more than chance explains, where the distribution does not fit, or where the sample is small,
  that tail decides nothing. Strata of unlike scales make such tails. So one is fitted to errors as multiples of their
  stratum's mean, and its tolerance is multiplied by the 99 % upper confidence limit of the largest mean (regional
  frequency analysis pools sites that way: Hosking and Wallis 1997). Where that one fails as well, the bound decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ktonum.declare.cases import seed_of
from ktonum.tolerances.tables import ErrorSample, Tail

__all__ = ["LEAST", "describe_sample", "exceedance", "fit_tail", "four_digits", "tail_tolerance"]

#: A sample smaller than this has no tail to speak of.
LEAST = 100
# The largest fifth is the tail: twenty errors at least.
_SHARE = 0.2
# Fewer distinct errors than this above the threshold are no tail: roundings may repeat each other.
_FEWEST = 20
# The fit is called poor below this: one good fit in a hundred is.
_POOR = 0.01
_CONFIDENCE = 0.99
# What the moments of a half-normal distribution's upper fifth make of ξ, −0.176, which far out is 0; sign reversed.
_NORMAL_SHAPE = 0.18
_REPLICAS = 499

NO_TAIL = Tail(0, 0.0, 0.0, 0.0, 0.0)


def four_digits(value: float) -> float:
    """Rounded, so that another measurement changes in a table what it changed and no more."""
    return float(f"{value:.4g}")


def _six_digits(value: float) -> float:
    """For a threshold: excesses may be thousandths of it."""
    return float(f"{value:.6g}")


def describe_sample(
    strata: Sequence[Sequence[float]], *, bound: float, false_alarm: float, least: float = 0.0
) -> ErrorSample:
    """Order statistics, tail and tolerance of errors that are all within ``bound``.

    Args:
        strata: The errors of each stratum.
        bound: The largest tolerance.
        false_alarm: The probability that a right result exceeds the tolerance.
        least: What any right result may come to, whatever the sample came to; no more than ``bound``.
    """
    sample = sorted(value for stratum in strata for value in stratum)
    ordered = [four_digits(value) for value in sample]
    decided_by, typical = "tail", 1.0
    tail, why = fit_tail(sample)
    if tail.exceeding and why:
        scaled, largest = _relative_to_strata(strata)
        other, objection = fit_tail(scaled)
        if not objection:
            decided_by, typical, tail, why = "strata", largest, other, ""
    tolerance = bound
    if not why:
        # From the numbers that the table keeps, so that a reader can do the sum.
        reached = tail_tolerance(tail, samples=len(sample), strata=len(strata), false_alarm=false_alarm)
        tolerance = max(ordered[-1], four_digits(typical * reached))
        if tolerance < least:
            tolerance, decided_by = least, "rounding"
        why = f"the tail reaches {tolerance:g}" if tolerance >= bound else ""
    return ErrorSample(
        median=_order_statistic(ordered, 0.5),
        quantile_90=_order_statistic(ordered, 0.9),
        quantile_99=_order_statistic(ordered, 0.99),
        maximum=ordered[-1],
        tolerance=min(bound, tolerance),
        decided_by=f"bound: {why}" if why else decided_by,
        typical=typical,
        tail=tail,
    )


def _relative_to_strata(strata: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """The errors as multiples of their stratum's mean, ascending; and the upper limit of the largest mean."""
    scaled: list[float] = []
    largest = 0.0
    for stratum in map(np.asarray, strata):
        mean = float(stratum.mean())
        if mean > 0:
            scaled += [float(value) for value in stratum / mean]
        deviation = float(stratum.std()) / math.sqrt(stratum.size)
        largest = max(largest, mean + float(stats.norm.ppf(_CONFIDENCE)) * deviation)
    return sorted(scaled), four_digits(largest)


def _order_statistic(ordered: Sequence[float], level: float) -> float:
    return ordered[math.ceil(level * len(ordered)) - 1]


def fit_tail(ordered: Sequence[float], *, replicas: int = _REPLICAS) -> tuple[Tail, str]:
    """The tail of an ascending sample; and why no tolerance may rest on it, empty where one may.

    Args:
        ordered: The sample.
        replicas: How many samples of the fitted distribution the p-value is from; 0 takes the fit to be good.
    """
    count = len(ordered)
    if count < LEAST:
        return NO_TAIL, f"{count} samples, fewer than {LEAST}"
    if ordered[-1] == 0:
        return NO_TAIL, "every error is zero, the candidate is the oracle"
    threshold = ordered[count - math.ceil(_SHARE * count) - 1]
    excesses = np.asarray([value - threshold for value in ordered if value > threshold])
    exceeding, distinct = excesses.size, np.unique(excesses).size
    if distinct < _FEWEST:
        return NO_TAIL, f"{distinct} distinct errors above the threshold, fewer than {_FEWEST}"
    shapes, scales = _probability_weighted(excesses[None])
    shape, scale = four_digits(float(shapes[0])), four_digits(float(scales[0]))
    seed = seed_of(f"anderson-darling {exceeding} {shape} {scale}")
    tail = Tail(
        exceeding,
        _six_digits(threshold),
        shape,
        scale,
        four_digits(_goodness_of_fit(excesses, shape, scale, seed, replicas)),
    )
    if tail.fit < _POOR:
        return tail, f"the tail fits poorly, p = {tail.fit:g}"
    if shape > float(stats.norm.isf(0.05)) * _shape_error(0.0, exceeding):
        return tail, f"the tail is heavier than exponential, shape {shape:g}"
    return tail, ""


def tail_tolerance(tail: Tail, *, samples: int, strata: int, false_alarm: float) -> float:
    """What a right result exceeds with probability ``false_alarm`` at most, by the upper limits of the fitted tail."""
    # The mean is the first of the two moments which shape and scale were made from.
    mean = tail.scale / (1 - tail.shape)
    mean *= 2 * tail.exceeding / float(stats.chi2.ppf(1 - _CONFIDENCE, 2 * tail.exceeding))
    shape = tail.shape + float(stats.norm.ppf(_CONFIDENCE)) * _shape_error(tail.shape, tail.exceeding)
    shape = min(0.0, shape + _NORMAL_SHAPE)
    level = false_alarm / strata / (tail.exceeding / samples)
    return tail.threshold + float(stats.genpareto.isf(level, shape, scale=mean * (1 - shape)))


def _shape_error(shape: float, exceeding: int) -> float:
    """The standard error of ξ's estimate for large samples, by Hosking and Wallis 1987; for ξ < 1/2."""
    k = -min(shape, 0.0)
    return math.sqrt((1 + k) * (2 + k) ** 2 * (1 + k + 2 * k**2) / ((1 + 2 * k) * (3 + 2 * k)) / exceeding)


def exceedance(tail: Tail, *, samples: int, level: float) -> float:
    """The error that the fitted tail says is exceeded with probability ``level``.

    Raises:
        ValueError: ``level`` is beyond the tail: more than the share of the sample above the threshold.
    """
    share = tail.exceeding / samples
    if not level <= share:
        raise ValueError(f"level {level:g}: the tail holds {share:g} of the sample")
    return tail.threshold + float(stats.genpareto.isf(level / share, tail.shape, scale=tail.scale))


def _probability_weighted(excesses: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Shape and scale by row from ascending rows: ξ = 2 − a/(a − 2b), σ = 2ab/(a − 2b), a = E x, b = E x (1 − F)."""
    count = excesses.shape[1]
    weights = (count - np.arange(1, count + 1)) / (count - 1)
    first, second = excesses.mean(axis=1), (excesses * weights).mean(axis=1)
    difference = first - 2 * second
    return 2 - first / difference, 2 * first * second / difference


def _goodness_of_fit(excesses: np.ndarray[Any, Any], shape: float, scale: float, seed: int, replicas: int) -> float:
    """The p-value of the Anderson–Darling statistic by parametric bootstrap."""
    if not replicas:
        return 1.0
    found = _anderson_darling(excesses[None], np.array([shape]), np.array([scale]))[0]
    size = (replicas, excesses.size)
    drawn = stats.genpareto.rvs(shape, scale=scale, size=size, random_state=np.random.default_rng(seed))
    drawn.sort(axis=1)
    others = _anderson_darling(drawn, *_probability_weighted(drawn))
    return float((1 + (others >= found).sum()) / (1 + replicas))


def _anderson_darling(
    excesses: np.ndarray[Any, Any], shapes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    count = excesses.shape[1]
    # An estimate may put an end to the distribution before the largest of the sample; that is a bad fit, not an
    # infinitely bad one.
    below = stats.genpareto.cdf(excesses, shapes[:, None], scale=scales[:, None]).clip(1e-12, 1 - 1e-12)
    ranks = 2 * np.arange(1, count + 1) - 1
    return np.asarray(-count - (ranks * (np.log(below) + np.log1p(-below[:, ::-1]))).mean(axis=1))
