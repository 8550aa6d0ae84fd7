"""Tails: how they are fitted, and which tolerances follow for known distributions."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ktonum.calibrate.tails import LEAST, describe_sample, exceedance, fit_tail, tail_tolerance

BUDGET: dict[str, Any] = {"false_alarm": 1e-6}


def drawn(distribution: Any, count: int, seed: int = 0) -> list[float]:
    return [float(x) for x in distribution.rvs(size=count, random_state=np.random.default_rng(seed))]


LIGHT = {
    "exponential": stats.expon(),
    "half normal": stats.halfnorm(),
    "uniform": stats.uniform(),
    "largest of 1000 normal": stats.exponweib(a=1000, c=2, scale=math.sqrt(2)),
}


@pytest.mark.parametrize("count", [200, 1000])
@pytest.mark.parametrize("name", LIGHT)
def test_a_tolerance_keeps_its_budget_where_the_distribution_is_known(name: str, count: int) -> None:
    """The exact rate at which fresh errors exceed the tolerance, for 60 samples. Their mean is the rate of an audit."""
    found = [describe_sample([drawn(LIGHT[name], count, seed)], bound=math.inf, **BUDGET) for seed in range(60)]
    by_tail = [e for e in found if e.decided_by == "tail"]
    assert len(by_tail) >= 50, [e.decided_by for e in found]
    assert float(np.mean([LIGHT[name].sf(e.tolerance) for e in by_tail])) <= 1e-6
    # The tolerance is not vacuous either: at most a few times the largest error of the sample.
    assert max(e.tolerance / e.maximum for e in by_tail) < 7


@pytest.mark.parametrize("name", LIGHT)
def test_a_good_fit_is_not_rejected_more_often_than_it_says(name: str) -> None:
    fits = np.array([fit_tail(sorted(drawn(LIGHT[name], 300, seed)))[0].fit for seed in range(200)])
    # The expected shares are 0.05 and 0.5. Three standard errors of two hundred fits are added.
    assert np.mean(fits < 0.05) < 0.1 and np.mean(fits < 0.5) < 0.61


@pytest.mark.parametrize("level", [0.1, 0.01, 1e-3])
def test_fitted_levels_are_those_of_the_distribution(level: float) -> None:
    reached = []
    for seed in range(20):
        tail, why = fit_tail(sorted(drawn(stats.expon(), 2000, seed)))
        assert tail.exceeding == 400, why
        reached.append(float(stats.expon.sf(exceedance(tail, samples=2000, level=level))))
    assert float(np.mean(reached)) == pytest.approx(level, rel=0.25)


def test_a_level_that_the_tail_does_not_hold_is_refused() -> None:
    tail, _ = fit_tail(sorted(drawn(stats.expon(), 400)))
    with pytest.raises(ValueError, match=r"level 0\.3: the tail holds 0\.2"):
        exceedance(tail, samples=400, level=0.3)


def lump(count: int) -> list[float]:
    """A tail of two lumps that are far apart, as if two kernels were in one sample."""
    return [
        float(x) for x in np.r_[np.linspace(0, 1, count - 60), 1 + np.linspace(0, 0.01, 40), np.linspace(9, 9.1, 20)]
    ]


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        (drawn(stats.halfnorm(), LEAST - 1), "99 samples, fewer than 100"),
        (drawn(stats.cauchy(), 2000), "heavier than exponential|fits poorly"),
        ([0.0] * 500, "every error is zero"),
        ([0.0, 0.5, 1.0] * 200, "distinct errors above the threshold, fewer than 20"),
        (lump(300), "fits poorly, p = "),
    ],
    ids=["small", "heavy", "zeros", "repeated", "two lumps"],
)
def test_where_the_tail_cannot_decide_the_bound_does_and_says_why(sample: list[float], why: str) -> None:
    sample = [abs(x) for x in sample]
    found = describe_sample([sample], bound=1e9, **BUDGET)
    assert found.tolerance == 1e9
    assert re.match(f"bound: .*({why})", found.decided_by), found.decided_by


def test_a_tolerance_is_never_above_the_bound_nor_below_the_largest_error() -> None:
    for bound in (3.5, 4.0, 6.0, 1e3):
        found = describe_sample([[min(x, 3.5) for x in drawn(stats.halfnorm(), 1000)]], bound=bound, **BUDGET)
        assert found.maximum <= found.tolerance <= bound
    assert describe_sample([drawn(stats.expon(), 1000)], bound=8.0, **BUDGET).decided_by.startswith(
        "bound: the tail reach"
    )


def test_more_strata_and_smaller_budgets_ask_for_more() -> None:
    tail, _ = fit_tail(sorted(drawn(stats.expon(), 1000)))
    reached = [
        tail_tolerance(tail, samples=1000, strata=strata, false_alarm=alarm)
        for strata, alarm in ((1, 1e-3), (1, 1e-6), (5, 1e-6), (5, 1e-9))
    ]
    assert reached == sorted(reached)
    # One of five strata has all errors above the threshold. Even alone, it keeps the budget.
    small = [[0.1 * x for x in drawn(stats.expon(), 200, seed)] for seed in range(4)]
    found = describe_sample([*small, drawn(stats.expon(), 200, seed=9)], bound=math.inf, false_alarm=1e-4)
    assert float(stats.expon.sf(found.tolerance)) <= 1e-4


def test_strata_of_unlike_scales_are_compared_with_their_own_means() -> None:
    """Together they have a heavy tail, but each is half-normal. The widest one keeps its budget."""
    scales = (*[0.3] * 9, 3.0)
    rates = []
    for seed in range(30):
        strata = [[s * x for x in drawn(stats.halfnorm(), 100, 10 * seed + i)] for i, s in enumerate(scales)]
        found = describe_sample(strata, bound=1e9, **BUDGET)
        if found.decided_by == "strata":
            assert found.typical == pytest.approx(3 * math.sqrt(2 / math.pi), rel=0.5)
            rates.append(float(stats.halfnorm.sf(found.tolerance / 3)))
    assert len(rates) >= 20 and float(np.mean(rates)) <= 1e-6


def test_a_tolerance_below_the_least_says_so() -> None:
    found = describe_sample([drawn(stats.uniform(), 500)], bound=9.0, least=5.0, **BUDGET)
    assert (found.tolerance, found.decided_by) == (5.0, "rounding")
    assert describe_sample([drawn(stats.uniform(), 500)], bound=9.0, least=0.5, **BUDGET).decided_by == "tail"
