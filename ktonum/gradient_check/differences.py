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

from ktonum.gradient_check.odd_fits import FEWEST_FREEDOM, windows

__all__ = [
    "DerivativeEstimate",
    "HalfDifference",
    "derivative",
    "extrapolate",
    "ladder",
    "next_step",
    "sharpest_step",
]

#: Two-sided quantiles of Student's t at a risk of 1e-6, for 1, 2, ... degrees of freedom. They say how far an estimate
#: can be from the truth, in standard deviations that were estimated from so few residuals.
STUDENT = (636600.0, 1000.0, 130.2, 49.46, 28.48, 20.05, 15.77, 13.26, 11.64, 10.52)
#: The factor in place of `STUDENT` for a noise level that is known beforehand: 5 standard deviations of a normal
#: distribution (risk 6e-7), and room for functions that round a few times instead of once.
KNOWN_NOISE = 8.0
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
    if len(usable) <= FEWEST_FREEDOM:
        return best
    known = windows(tuple(d.step for d in usable))
    values = np.array([d.odd for d in usable])
    slopes = (known.slopes @ values).tolist()
    residuals = np.square(known.residuals @ values).sum(-1).tolist()
    finer: list[DerivativeEstimate] = []
    for start in reversed(range(len(usable) - FEWEST_FREEDOM)):
        numbers = [k for k, (first, _, _) in enumerate(known.fits) if first == start]
        freest = len(usable) - start
        # Rounding of the largest value inside the fit itself.
        floor = max(noise_floor, 2.0**-53 * max(abs(d.odd) for d in usable[start:]))
        fits = []
        for number, following in zip(numbers, numbers[1:], strict=False):
            _, terms, unit_error = known.fits[number]
            freedom = freest - terms
            if freedom < FEWEST_FREEDOM:
                break
            deviation = math.sqrt(residuals[number] / freedom)
            noise_part = max(student_factor(freedom) * deviation, KNOWN_NOISE * floor) * unit_error
            truncation = abs(slopes[number] - slopes[following])
            fits.append(
                DerivativeEstimate(
                    value=slopes[number],
                    error_bar=truncation + noise_part,
                    truncation=truncation,
                    noise_part=noise_part,
                    noise=max(deviation, floor),
                    step=usable[start].step,
                    terms=terms,
                    freedom=freedom,
                    levels=len(usable),
                )
            )
        if not fits:
            continue
        # An oscillation that coarse steps jump over looks like noise to them; finer steps that resolve it win.
        settled = [e for e in fits if all(abs(e.value - f.value) <= e.error_bar + f.error_bar for f in finer)]
        best = min([best, *settled], key=lambda e: e.error_bar)
        finer.append(min(fits, key=lambda e: e.error_bar))
    return best


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
    if noisy and not refused and estimate.step == steps[-1] and not _still_converging(differences, ratio):
        return steps[-1] * ratio
    return steps[0] / ratio


def _still_converging(differences: Sequence[HalfDifference], ratio: float) -> bool:
    """Whether the slopes at the finest steps come closer to one another. Noise would drive them apart.

    A fit of few steps takes the part of a function that its terms cannot follow for noise.
    """
    slopes = [d.odd / d.step for d in sorted(differences, key=lambda d: d.step) if d.usable][:3]
    return len(slopes) == 3 and 0.0 < abs(slopes[0] - slopes[1]) * ratio < abs(slopes[1] - slopes[2])


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
