r"""The tail of a sample of errors, and the tolerance that few right results exceed.

Errors above a high threshold nearly follow a generalized Pareto distribution with shape ξ and scale σ, whatever the
distribution of all errors is (Balkema and de Haan 1974; Pickands 1975, Ann. Statist. 3(1), 119; Coles 2001, An
Introduction to Statistical Modeling of Extreme Values, chapter 4). Here the threshold is an order statistic. ξ and σ
come from probability-weighted moments (Hosking and Wallis 1987, Technometrics 29(3), 339), which are more stable than
maximum likelihood for samples of this size. The Anderson–Darling statistic measures how well the distribution fits. Its
p-value comes from samples of the fitted distribution, each of which is fitted again (Stute, González Manteiga and
Presedo Quindimil 1993, Metrika 40, 243).

A tolerance for one false alarm in a million extrapolates far beyond a sample of hundreds. Three rules make it rather
too loose than too tight, but never looser than the derived bound:

- Rounding errors have an upper limit, and in most samples ξ < 0 shows it. But the sample hardly determines where the
  limit is. So the tolerance uses the 99 % upper confidence limit of ξ, plus a correction, because a fit to the tail of
  a normal distribution also has ξ < 0; and at most ξ = 0, the exponential tail. It also uses the 99 % upper confidence
  limit of the mean excess m, which is exact for ξ = 0: :math:`t = u + m (1 - ξ) ((α / ζs)^{-ξ} - 1) / ξ`, where ζ is
  the share of errors above the threshold u, α the budget of false alarms, and s the number of strata.
- A sample consists of s strata. Each has one point and one candidate. If all errors above the threshold came from one
  of s equal strata, its rate would be s times the mean rate. So α is divided by s.
- Strata of different scales can make the tail heavy or the fit poor. If ξ is above zero by more than chance explains,
  or the distribution does not fit, another tail is fitted: to the errors as multiples of their stratum's mean. Its
  tolerance is multiplied by the 99 % upper confidence limit of the largest mean. Regional frequency analysis pools
  sites in this way (Hosking and Wallis 1997).

If this fails too, or if the sample is too small for a tail, the bound is the tolerance.
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

#: The smallest sample to which a tail is fitted.
LEAST = 100
# The tail is the largest fifth of the sample, which is at least twenty errors.
_SHARE = 0.2
# The fewest distinct errors above the threshold. Errors of roundings may be equal.
_FEWEST = 20
# A fit with a smaller p-value is poor. One good fit in a hundred has a smaller one.
_POOR = 0.01
_CONFIDENCE = 0.99
# The moments of the upper fifth of a half-normal distribution give ξ = −0.176, but far out its tail has ξ = 0. This
# corrects for it.
_NORMAL_SHAPE = 0.18
_REPLICAS = 499

NO_TAIL = Tail(0, 0.0, 0.0, 0.0, 0.0)


def four_digits(value: float) -> float:
    """Rounded to four digits, so that a new measurement changes only those numbers of a table that really differ."""
    return float(f"{value:.4g}")


def _six_digits(value: float) -> float:
    """Rounded to six digits, for a threshold: excesses over it may be thousandths of it."""
    return float(f"{value:.6g}")


def describe_sample(
    strata: Sequence[Sequence[float]], *, bound: float, false_alarm: float, least: float = 0.0
) -> ErrorSample:
    """Order statistics, tail and tolerance of errors that are all within ``bound``.

    Args:
        strata: The errors of each stratum.
        bound: The largest tolerance.
        false_alarm: The probability that a right result exceeds the tolerance.
        least: The smallest tolerance, for an error that a right result can have even if no sample has; at most
            ``bound``.
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
        # Use the rounded numbers of the table, so that a reader can repeat the calculation.
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
    """The tail of a sample, and why no tolerance may be based on it; the reason is empty if one may.

    Args:
        ordered: The sample, ascending.
        replicas: The number of samples of the fitted distribution for the p-value. With 0, the fit is assumed to be
            good.
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
    """The error that a right result exceeds with a probability of at most ``false_alarm``.

    It uses the upper confidence limits of the fitted tail, see the top of this file.

    Args:
        tail: The fitted tail.
        samples: The size of the sample.
        strata: The number of its strata.
        false_alarm: The probability.
    """
    # The mean excess is the first of the two moments from which shape and scale were calculated.
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
    """The error that is exceeded with probability ``level``, according to the fitted tail.

    Raises:
        ValueError: ``level`` is larger than the share of the sample above the threshold.
    """
    share = tail.exceeding / samples
    if not level <= share:
        raise ValueError(f"level {level:g}: the tail holds {share:g} of the sample; pass a level of at most that")
    return tail.threshold + float(stats.genpareto.isf(level / share, tail.shape, scale=tail.scale))


def _probability_weighted(excesses: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Shape and scale for each row of ascending excesses x, (rows, n).

    ξ = 2 − a/(a − 2b) and σ = 2ab/(a − 2b), with a = E x and b = E x (1 − F).
    """
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
    # The fitted distribution may end below the largest error of the sample. This is a bad fit, but it must not give an
    # infinite statistic.
    below = stats.genpareto.cdf(excesses, shapes[:, None], scale=scales[:, None]).clip(1e-12, 1 - 1e-12)
    ranks = 2 * np.arange(1, count + 1) - 1
    return np.asarray(-count - (ranks * (np.log(below) + np.log1p(-below[:, ::-1]))).mean(axis=1))
