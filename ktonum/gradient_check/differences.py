"""Central differences of functions of one real variable: steps, extrapolation and an error bar.

The caller passes half differences ``(phi(+h) - phi(-h)) / 2``, so that it can subtract tensors element by element
before it sums them. This module knows neither autograd nor torch.

For a smooth ``phi``, the half difference is odd in ``h``: ``a1 h + a3 h^3 + a5 h^5 + ... + noise``, and ``a1`` is the
derivative. Richardson's extrapolation (Richardson 1911; Romberg 1955) eliminates a3, a5, ... exactly. Here they are
*fitted* by least squares over a geometric ladder of steps, as numdifftools does. There are more steps than terms, so
the residual of the fit measures the noise of ``phi``, and the error bar includes this noise. Difference tables have the
same idea (Hamming 1973, section 10; More and Wild, "Estimating computational noise", 2011), but need more evaluations.
As in Ridders (1982), every window of the ladder is tried, and the smallest error bar wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "DerivativeEstimate",
    "HalfDifference",
    "derivative",
    "extrapolate",
    "kink_slope",
    "ladder",
    "next_step",
    "sharpest_step",
]

#: Two-sided quantiles of Student's t at a risk of 1e-6, for 1, 2, ... degrees of freedom. They say how far an estimate
#: can be from the truth, in standard deviations that were estimated from so few residuals.
STUDENT = (636600.0, 1000.0, 130.2, 49.46, 28.48, 20.05, 15.77, 13.26, 11.64, 10.52)
#: The fewest surplus steps of a fit. A single one often agrees by accident if the noise has few distinct values.
FEWEST_FREEDOM = 2
#: The factor in place of `STUDENT` for a noise level that is known beforehand: 5 standard deviations of a normal
#: distribution (risk 6e-7), and room for functions that round a few times instead of once.
KNOWN_NOISE = 8.0
#: The most terms that are fitted, a1 h to a7 h^7. More terms would need smaller steps than the noise allows.
MOST_TERMS = 4
#: Ratio of neighbouring steps in float64. With 8, five steps span 2^12. So one ladder suits functions of unknown length
#: scale, and its small steps show the noise.
RATIO = 8.0
#: A residual above this share of the function's size is not treated as rounding noise.
LARGEST_NOISE = 2.0**-10


@dataclass(frozen=True)
class HalfDifference:
    """One central difference.

    Attributes:
        step: The step h > 0.
        odd: ``(phi(h) - phi(-h)) / 2``.
    """

    step: float
    odd: float

    @property
    def usable(self) -> bool:
        """Whether the value is finite. It is not if the step leaves the domain of ``phi``."""
        return math.isfinite(self.odd)


@dataclass(frozen=True)
class DerivativeEstimate:
    """A derivative and its accuracy.

    Attributes:
        value: The estimate of ``phi'(0)``.
        error_bar: Bound on its error: ``truncation + noise_part``; ``inf`` if nothing could be estimated.
        truncation: How much the estimate changes when one more Taylor term is fitted.
        noise_part: The effect of the noise on the estimate, times Student's t for the degrees of freedom, or times
            `KNOWN_NOISE` for the given noise floor if that is larger.
        noise: Standard deviation of one half difference, from the residual; at least the given noise floor.
        step: The largest step in the fit.
        terms: Number of Taylor terms in the fit.
        freedom: Number of steps minus number of terms.
        levels: Number of usable steps that were available.
    """

    value: float
    error_bar: float
    truncation: float
    noise_part: float
    noise: float
    step: float
    terms: int
    freedom: int
    levels: int

    @property
    def converged(self) -> bool:
        """Whether the error bar is at most a thousandth of the derivative."""
        return self.error_bar <= 1e-3 * abs(self.value)


def ladder(top: float, levels: int, ratio: float = RATIO) -> tuple[float, ...]:
    """``levels`` steps ``top, top / ratio, ...``.

    If ``top`` and ``ratio`` are powers of two, the steps are exact, as Press et al. (Numerical Recipes 5.7) advise.

    Raises:
        ValueError: ``top`` is not positive, ``ratio`` is not above 1, or ``levels`` is below 1.
    """
    if not top > 0.0 or not ratio > 1.0 or levels < 1:
        raise ValueError(
            f"top = {top}, ratio = {ratio}, levels = {levels}: a ladder needs top > 0, ratio > 1 and levels >= 1"
        )
    return tuple(top / ratio**level for level in range(levels))


def student_factor(freedom: int) -> float:
    """Student's t quantile for ``freedom`` >= 1 at a two-sided risk of 1e-6; beyond the table, its last entry."""
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def fit_odd(differences: Sequence[HalfDifference], terms: int) -> tuple[float, float, float]:
    """Least-squares fit of ``a1 h + a3 h^3 + ...`` with ``terms`` terms to the half differences.

    Steps are divided by the largest one so that the columns are comparable. The fit uses QR, because normal equations
    would lose digits.

    Returns:
        ``a1``; the standard deviation of ``a1`` for a noise of 1 in each half difference; the residual sum of squares.

    Raises:
        numpy.linalg.LinAlgError: The steps are too far apart to distinguish so many terms.
    """
    top = max(d.step for d in differences)
    steps = np.array([d.step / top for d in differences], dtype=np.float64)
    values = np.array([d.odd for d in differences], dtype=np.float64)
    columns = steps[:, None] ** (2 * np.arange(terms) + 1)
    orthogonal, triangular = np.linalg.qr(columns)
    first_row = np.linalg.solve(triangular.T, np.eye(terms)[0])
    coefficients = np.linalg.solve(triangular, orthogonal.T @ values)
    residual = values - columns @ coefficients
    return float(coefficients[0]) / top, float(np.linalg.norm(first_row)) / top, float(residual @ residual)


def extrapolate(differences: Sequence[HalfDifference], *, noise_floor: float) -> DerivativeEstimate:
    """The derivative at 0 with the smallest error bar that the differences support.

    A window is a run of neighbouring steps that ends at the smallest step. Each window is fitted with every number of
    terms that leaves at least `FEWEST_FREEDOM` degrees of freedom. So large steps can be left out where the function is
    not smooth over them. Small steps always stay: they do no harm in a least-squares fit with equal noise, and they
    show this noise.

    Args:
        differences: At least three, with distinct steps, in any order; unusable ones are dropped. With fewer usable
            ones, the error bar is infinite.
        noise_floor: The least standard deviation that a half difference can have, in the function's own unit.
    """
    usable = sorted((d for d in differences if d.usable), key=lambda d: -d.step)
    best = DerivativeEstimate(math.nan, math.inf, math.inf, math.inf, math.inf, math.nan, 0, 0, len(usable))
    finer: list[DerivativeEstimate] = []
    for start in reversed(range(len(usable) - FEWEST_FREEDOM)):
        fits = _fits(usable[start:], noise_floor, len(usable))
        if not fits:
            continue
        # Coarse steps jump over a fast oscillation, which then looks like noise. So a coarse fit must agree with the
        # finer ones, which resolve it.
        settled = [e for e in fits if all(abs(e.value - f.value) <= e.error_bar + f.error_bar for f in finer)]
        best = min([best, *settled], key=lambda e: e.error_bar)
        finer.append(min(fits, key=lambda e: e.error_bar))
    return best


def _fits(window: Sequence[HalfDifference], noise_floor: float, levels: int) -> list[DerivativeEstimate]:
    """Estimates with 1, 2, ... Taylor terms from one window (largest step first)."""
    fits = []
    for terms in range(1, min(MOST_TERMS + 1, len(window)) + 1):
        try:
            fits.append(fit_odd(window, terms))
        except np.linalg.LinAlgError:  # the steps are too far apart, e.g. 1, 8e-6, 1e-6 for ninth powers
            break
    # The fit itself rounds the largest value.
    floor = max(noise_floor, 2.0**-53 * max(abs(d.odd) for d in window))
    estimates = []
    for terms in range(1, min(len(fits), len(window) - FEWEST_FREEDOM + 1)):
        (value, unit_error, residual), (higher, _, _) = fits[terms - 1], fits[terms]
        freedom = len(window) - terms
        deviation = math.sqrt(residual / freedom)
        noise_part = max(student_factor(freedom) * deviation, KNOWN_NOISE * floor) * unit_error
        truncation = abs(value - higher)
        bar, noise, top = truncation + noise_part, max(deviation, floor), window[0].step
        estimates.append(DerivativeEstimate(value, bar, truncation, noise_part, noise, top, terms, freedom, levels))
    return estimates


def next_step(
    differences: Sequence[HalfDifference], estimate: DerivativeEstimate, *, size: float, ratio: float = RATIO
) -> float:
    """The step that would improve ``estimate`` most: above the ladder's top if noise dominates, otherwise below it.

    Args:
        differences: All differences so far, including unusable ones.
        estimate: The result of `extrapolate` for them.
        size: The size of the function. A residual above `LARGEST_NOISE` of it means that the steps are too coarse.
        ratio: The ladder's ratio.
    """
    steps = sorted(d.step for d in differences)
    refused = any(not d.usable for d in differences)
    noisy = estimate.noise_part >= estimate.truncation and estimate.noise <= LARGEST_NOISE * size
    if noisy and not refused and estimate.step == steps[-1]:
        return steps[-1] * ratio
    return steps[0] / ratio


def sharpest_step(differences: Sequence[HalfDifference], estimate: DerivativeEstimate) -> tuple[float, float]:
    """The step whose plain central difference is most accurate, and a bound on the error of this difference.

    Once the derivative is known, one difference at this step (two evaluations) is accurate enough to compare
    directions.

    Returns:
        The step and the bound: the distance from the extrapolated value, the noise at this step and the error bar of
        the extrapolated value.
    """
    candidates = [
        (abs(d.odd / d.step - estimate.value) + KNOWN_NOISE * estimate.noise / d.step + estimate.error_bar, d.step)
        for d in differences
        if d.usable
    ]
    error, step = min(candidates)
    return step, error


def kink_slope(bends: Sequence[tuple[float, float]]) -> float:
    """The difference of the one-sided slopes at 0, or 0.0 if there is no sign of a kink.

    A central difference does not see a kink at 0, because it converges to the mean of the two slopes. The bend
    ``|phi(h) + phi(-h) - 2 phi(0)|`` does. It is of order h^2 where phi is smooth, of order h at a kink, and constant
    where rounding dominates. So from step to smaller step, bend / h falls, stays or rises. If it stays over three
    neighbouring steps, there is a kink. Where curvature gives way to noise, it stays over two steps at most.

    Args:
        bends: Pairs ``(step, bend)``; those with a bend that is not finite are dropped.
    """
    slopes = [bend / step for step, bend in sorted(bends) if math.isfinite(bend)]
    plateaus = [
        middle
        for low, middle, high in zip(slopes, slopes[1:], slopes[2:], strict=False)
        if 0.0 < max(low, middle, high) <= 1.5 * min(low, middle, high)
    ]
    return min(plateaus, default=0.0)


def derivative(
    half_difference: Callable[[float], float],
    *,
    noise_floor: float,
    size: float,
    top: float = 2.0**-5,
    levels: int = 5,
    ratio: float = RATIO,
    most_levels: int = 10,
    wanted: float = 0.0,
) -> tuple[DerivativeEstimate, tuple[HalfDifference, ...]]:
    """Take a ladder of steps, then add steps above or below it until the error bar is small enough.

    Args:
        half_difference: ``h -> (phi(h) - phi(-h)) / 2``; NaN or infinity where ``phi`` is not defined.
        noise_floor: See `extrapolate`.
        size: The size of ``phi``, see `next_step`.
        top: The first step, in the unit of the variable of ``phi``.
        levels: Number of steps before the first estimate.
        ratio: Ratio of neighbouring steps.
        most_levels: The most steps in total.
        wanted: No step is added once the error bar is at most this. 0 means: take ``most_levels`` steps.

    Returns:
        The estimate, and all differences.
    """
    taken = [HalfDifference(step, half_difference(step)) for step in ladder(top, min(levels, most_levels), ratio)]
    estimate = extrapolate(taken, noise_floor=noise_floor)
    while len(taken) < most_levels and not estimate.error_bar <= wanted:
        step = next_step(taken, estimate, size=size, ratio=ratio)
        taken.append(HalfDifference(step, half_difference(step)))
        estimate = extrapolate(taken, noise_floor=noise_floor)
    return estimate, tuple(taken)
