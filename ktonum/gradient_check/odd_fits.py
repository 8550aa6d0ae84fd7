"""Least-squares fits of odd polynomials at geometric steps, prepared once for each set of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_FREEDOM", "MOST_TERMS", "Windows", "fit_odd", "windows"]

Array = NDArray[np.float64]

#: The fewest surplus steps of a fit. A single one often agrees by accident if the noise has few distinct values.
FEWEST_FREEDOM = 2
#: The most terms that are fitted, a1 h to a7 h^7. More terms would need smaller steps than the noise allows.
MOST_TERMS = 4


@dataclass(frozen=True)
class _Fit:
    """The least-squares fit of so many terms at given steps, ready for any values.

    Attributes:
        slope: The weights of the values in a1.
        unit_error: The standard deviation of a1 per unit noise of a value.
        residual: The matrix that leaves of the values what the terms cannot follow.
    """

    slope: Array
    unit_error: float
    residual: Array


@lru_cache(maxsize=4096)
def _fit(steps: tuple[float, ...], terms: int) -> _Fit | None:
    """The fit at ``steps``, largest first; None where they do not tell so many terms apart.

    Steps are divided by the largest, so that the columns are comparable, and the fit is by QR, never by normal
    equations. Ladders repeat, so the same few fits serve every check.
    """
    relative = np.array(steps) / steps[0]
    orthogonal, triangular = np.linalg.qr(relative[:, None] ** (2 * np.arange(terms) + 1))
    try:
        first_row = np.linalg.solve(triangular.T, np.eye(terms)[0])
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(first_row).all():
        return None
    residual = np.eye(len(steps)) - orthogonal @ orthogonal.T
    return _Fit(orthogonal @ first_row / steps[0], float(np.linalg.norm(first_row)) / steps[0], residual)


def fit_odd(steps: Sequence[float], values: Sequence[float], terms: int) -> tuple[float, float, float]:
    """Least-squares fit of ``a1 h + a3 h^3 + ...`` with ``terms`` terms to values at steps, in any order.

    Returns:
        ``a1``; the standard deviation of ``a1`` per unit noise of a half difference; the residual sum of squares.

    Raises:
        numpy.linalg.LinAlgError: The steps are too far apart to tell so many terms apart.
    """
    ordered = sorted(zip(steps, values, strict=True), reverse=True)
    fit = _fit(tuple(step for step, _ in ordered), terms)
    if fit is None:
        raise np.linalg.LinAlgError(f"{len(ordered)} steps do not tell {terms} terms apart")
    known = np.array([value for _, value in ordered])
    residual = fit.residual @ known
    return float(fit.slope @ known), fit.unit_error, float(residual @ residual)


@dataclass(frozen=True)
class Windows:
    """All fits that `ktonum.gradient_check.differences.extrapolate` makes at given steps, as one product.

    Attributes:
        fits: For each fit its first step, its terms, and its `_Fit.unit_error`.
        slopes: One row for each fit: weights of the values in a1.
        residuals: One matrix for each fit.
    """

    fits: tuple[tuple[int, int, float], ...]
    slopes: Array
    residuals: Array


@lru_cache(maxsize=1024)
def windows(steps: tuple[float, ...]) -> Windows:
    """Every run of the steps, largest first, that ends at the smallest, with 1, 2, ... terms each."""
    count = len(steps)
    fits, slopes, residuals = [], [], []
    for start in reversed(range(count - FEWEST_FREEDOM)):
        for terms in range(1, min(MOST_TERMS + 1, count - start) + 1):
            fit = _fit(steps[start:], terms)
            if fit is None:  # of steps 1, 8e-6, 1e-6 the ninth powers are nothing to the first
                break
            fits.append((start, terms, fit.unit_error))
            slopes.append(np.pad(fit.slope, (start, 0)))
            residuals.append(np.pad(fit.residual, ((start, 0), (start, 0))))
    return Windows(tuple(fits), np.array(slopes), np.array(residuals))
