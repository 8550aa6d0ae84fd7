"""Wilcoxon's signed-rank test, exact also with ties and for any number of pairs, and Holm's correction for many tests.

The null hypothesis says that the two sides of a pair may be swapped: each difference is as likely as its negative, for
any distribution. Then, with given sizes of the differences, all choices of signs are equally likely. The distribution
of the rank sum is counted and not approximated. Wilcoxon 1945, Biometrics Bulletin 1(6), 80; Holm 1979,
Scandinavian Journal of Statistics 6(2), 65.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["holm", "signed_rank_p"]


def signed_rank_p(differences: Sequence[float]) -> float:
    """Probability, under the null hypothesis, of a sum of positive ranks as large as that of ``differences``.

    Args:
        differences: One for each independent pair. Zeros are left out, because they are not evidence. Infinities have
            the highest ranks.

    Returns:
        The one-sided p-value for differences larger than zero; 1 if all differences are zero.
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
    """Corrected p-values. Reject those up to α, and the probability of any wrong rejection is at most α.

    This holds even if the tests depend on each other.
    """
    adjusted = [1.0] * len(p_values)
    least = 0.0
    for position, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        least = max(least, (len(p_values) - position) * p_values[i])
        adjusted[i] = min(1.0, least)
    return adjusted
