"""Wilcoxon's signed-rank test, exact with ties and for any number of pairs, and Holm's correction for many tests.

The null hypothesis is that swapping the two sides of a pair changes nothing: every difference is as likely as its
negative, whatever its distribution. Given the differences' sizes, each choice of signs is then equally likely, and the
distribution of the rank sum is counted, not approximated. Wilcoxon 1945, Biometrics Bulletin 1(6), 80; Holm 1979,
Scandinavian Journal of Statistics 6(2), 65.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["holm", "signed_rank_p"]


def signed_rank_p(differences: Sequence[float]) -> float:
    """Probability, under the null hypothesis, of a sum of positive ranks as large as that of ``differences``.

    Args:
        differences: One for each independent pair. Zeros are no evidence and left out; infinities rank highest.

    Returns:
        The one-sided p-value against "larger than zero"; 1 where nothing is left.
    """
    found = np.asarray([d for d in differences if d != 0], dtype=np.float64)
    if found.size == 0:
        return 1.0
    _, place, counts = np.unique(np.abs(found), return_inverse=True, return_counts=True)
    # Equal sizes share their mean rank. Twice the rank is a whole number, so sums of ranks can be counted.
    last = np.cumsum(counts)
    doubled = (2 * last - counts + 1)[place]
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances = chances / 2
        chances[rank:] += chances[:-rank].copy()
    return float(min(1.0, chances[int(doubled[found > 0].sum()) :].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those no larger than α are rejected, with at most α for a single false one among them all.

    Holds however the tests depend on one another.
    """
    adjusted = [1.0] * len(p_values)
    least = 0.0
    for position, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        least = max(least, (len(p_values) - position) * p_values[i])
        adjusted[i] = min(1.0, least)
    return adjusted
