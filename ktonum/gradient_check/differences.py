"""Central differences: steps, extrapolation and an honest error bar, for functions of one real variable.

The function is seen only through half differences ``(phi(+h) - phi(-h)) / 2``, so whoever calls can contract tensors
elementwise before summing. Knows neither autograd nor torch.

For a smooth ``phi`` the half difference is odd in ``h``, ``a1 h + a3 h^3 + a5 h^5 + ... + noise``, and ``a1`` is the
derivative. Richardson's extrapolation (Richardson 1911; Romberg 1955) eliminates a3, a5, ... exactly; here they are
*fitted* by least squares over a geometric ladder of steps with more steps than terms, as numdifftools does. The
surplus is what makes the error bar honest: the residual measures the noise of ``phi`` from its own values, which is
the idea of difference tables (Hamming 1973, section 10; More and Wild, "Estimating computational noise", 2011) without
extra evaluations. As in Ridders (1982) every window of the ladder is tried and the smallest error bar wins.
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

#: Two-sided quantiles of Student's t at a risk of 1e-6, for 1, 2, ... degrees of freedom: how far an estimate may lie
#: from the truth, in standard deviations estimated from so few residuals.
STUDENT = (636600.0, 1000.0, 130.2, 49.46, 28.48, 20.05, 15.77, 13.26, 11.64, 10.52)
#: Fewest surplus steps of a fit. One alone agrees by accident too often when the noise takes few distinct values.
FEWEST_FREEDOM = 2
#: The same as `STUDENT` for a noise level that is known beforehand: 5 deviations of a normal law (risk 6e-7), and
#: room for functions that round a few times instead of once.
KNOWN_NOISE = 8.0
#: Most terms a1 h ... a7 h^7 fitted; more would need steps that the noise forbids.
MOST_TERMS = 4
#: Ratio of neighbouring steps in float64. Eight spans 2^12 with five steps, so that one ladder suits functions whose
#: length scale is unknown, and leaves steps small enough to show the noise.
RATIO = 8.0
#: A residual above this share of the function's size is no rounding noise in any supported precision.
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
        """Whether the value is finite; a step that leaves the domain of ``phi`` is not."""
        return math.isfinite(self.odd)


@dataclass(frozen=True)
class DerivativeEstimate:
    """A derivative and how well it is known.

    Attributes:
        value: The estimate of ``phi'(0)``.
        error_bar: Bound on its error: ``truncation + noise_part``; ``inf`` when nothing could be estimated.
        truncation: How far the estimate moves when one more Taylor term is fitted.
        noise_part: The noise carried through the fit, times Student's t for the degrees of freedom.
        noise: Standard deviation of one half difference, from the residual, at least the floor that was given.
        step: The largest step used.
        terms: Taylor terms fitted.
        freedom: Steps used beyond the terms fitted.
        levels: Usable steps that were available.
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
        """Whether at least three digits of the derivative are known."""
        return self.error_bar <= 1e-3 * abs(self.value)


def ladder(top: float, levels: int, ratio: float = RATIO) -> tuple[float, ...]:
    """``levels`` steps ``top, top / ratio, ...``.

    With ``top`` and ``ratio`` powers of two the steps are exact, as Press et al. (Numerical Recipes 5.7) advise.

    Raises:
        ValueError: ``top`` is not positive, ``ratio`` is not above 1, or ``levels`` is below 1.
    """
    if not top > 0.0 or not ratio > 1.0 or levels < 1:
        raise ValueError(f"a ladder needs top > 0, ratio > 1, levels >= 1; got {top}, {ratio}, {levels}")
    return tuple(top / ratio**level for level in range(levels))


def student_factor(freedom: int) -> float:
    """Student's t quantile for ``freedom`` >= 1 at a two-sided risk of 1e-6; held constant beyond the table."""
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def fit_odd(differences: Sequence[HalfDifference], terms: int) -> tuple[float, float, float]:
    """Least-squares fit of ``a1 h + a3 h^3 + ...`` with ``terms`` terms to the half differences.

    Steps are divided by the largest so that the columns are comparable; the fit is by QR, never by normal equations.

    Returns:
        ``a1``; the standard deviation of ``a1`` per unit noise of a half difference; the residual sum of squares.

    Raises:
        numpy.linalg.LinAlgError: The steps do not tell so many terms apart, being too far from one another.
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

    Every run of neighbouring steps that ends at the smallest is fitted with every number of terms that leaves at
    least `FEWEST_FREEDOM` degrees of freedom. Large steps are dropped when they leave the smooth neighbourhood; small
    steps stay, for they cannot hurt a least-squares fit of equal noise, and they show that noise.

    Args:
        differences: At least three, with distinct steps, in any order; unusable ones are dropped.
        noise_floor: The least standard deviation that a half difference can have, in the function's own unit.
    """
    usable = sorted((d for d in differences if d.usable), key=lambda d: -d.step)
    best = DerivativeEstimate(math.nan, math.inf, math.inf, math.inf, math.inf, math.nan, 0, 0, len(usable))
    finer: list[DerivativeEstimate] = []
    for start in reversed(range(len(usable) - FEWEST_FREEDOM)):
        fits = _fits(usable[start:], noise_floor, len(usable))
        if not fits:
            continue
        # An oscillation that coarse steps jump over looks like noise to them; finer steps that resolve it win.
        settled = [e for e in fits if all(abs(e.value - f.value) <= e.error_bar + f.error_bar for f in finer)]
        best = min([best, *settled], key=lambda e: e.error_bar)
        finer.append(min(fits, key=lambda e: e.error_bar))
    return best


def _fits(window: Sequence[HalfDifference], noise_floor: float, levels: int) -> list[DerivativeEstimate]:
    """Estimates from one window (largest step first), with 1, 2, ... Taylor terms."""
    fits = []
    for terms in range(1, min(MOST_TERMS + 1, len(window)) + 1):
        try:
            fits.append(fit_odd(window, terms))
        except np.linalg.LinAlgError:  # of steps 1, 8e-6, 1e-6 the ninth powers are nothing to the first
            break
    # Rounding of the largest value inside the fit itself.
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
    """The step that would improve ``estimate`` most: beyond the ladder's top when noise rules, else below its end.

    Args:
        differences: All that were tried, unusable ones included.
        estimate: What `extrapolate` made of them.
        size: The size of the function, to tell noise from a step too coarse to follow it.
        ratio: The ladder's ratio.
    """
    steps = sorted(d.step for d in differences)
    refused = any(not d.usable for d in differences)
    noisy = estimate.noise_part >= estimate.truncation and estimate.noise <= LARGEST_NOISE * size
    if noisy and not refused and estimate.step == steps[-1]:
        return steps[-1] * ratio
    return steps[0] / ratio


def sharpest_step(differences: Sequence[HalfDifference], estimate: DerivativeEstimate) -> tuple[float, float]:
    """The single step whose plain central difference is nearest to the extrapolated value, and how near.

    Once the derivative is known, one difference at this step (two evaluations) tells directions apart well enough.

    Returns:
        The step and a bound on its error: the distance seen, the noise at that step and the estimate's own error bar.
    """
    candidates = [
        (abs(d.odd / d.step - estimate.value) + KNOWN_NOISE * estimate.noise / d.step + estimate.error_bar, d.step)
        for d in differences
        if d.usable
    ]
    error, step = min(candidates)
    return step, error


def kink_slope(bends: Sequence[tuple[float, float]]) -> float:
    """The jump of the one-sided slopes at 0, or 0.0 where none shows.

    ``bend(h) = |phi(h) + phi(-h) - 2 phi(0)|`` is of order h^2 where phi is smooth and of order h across a kink;
    rounding leaves it constant. So bend / h falls by the ladder's ratio, stays, or rises. Three neighbouring steps on
    which it stays are a kink: curvature meeting noise keeps it level on two at most. A central difference alone
    cannot see a kink at 0, it converges to the mean of the two slopes.

    Args:
        bends: Pairs ``(step, bend)``; non-finite ones are dropped.
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
    """Walk a ladder of steps, then extend it up or down until the error bar is small enough or the levels are spent.

    Args:
        half_difference: ``h -> (phi(h) - phi(-h)) / 2``; NaN or infinity where ``phi`` is not defined.
        noise_floor: See `extrapolate`.
        size: The size of ``phi``, see `next_step`.
        top: The first step, relative to the variable's natural length.
        levels: Steps taken before looking.
        ratio: Ratio of neighbouring steps.
        most_levels: Most steps in total.
        wanted: Stop extending when the error bar is at most this; 0 extends to the end.

    Returns:
        The estimate, and every difference taken.
    """
    taken = [HalfDifference(step, half_difference(step)) for step in ladder(top, min(levels, most_levels), ratio)]
    estimate = extrapolate(taken, noise_floor=noise_floor)
    while len(taken) < most_levels and not estimate.error_bar <= wanted:
        step = next_step(taken, estimate, size=size, ratio=ratio)
        taken.append(HalfDifference(step, half_difference(step)))
        estimate = extrapolate(taken, noise_floor=noise_floor)
    return estimate, tuple(taken)
