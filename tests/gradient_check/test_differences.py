"""Differences and extrapolation on functions with known derivatives: the error bar holds, and it is small."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from ktonum.gradient_check.bends import kink_slope
from ktonum.gradient_check.differences import (
    HalfDifference,
    derivative,
    extrapolate,
    ladder,
    next_step,
    sharpest_step,
    student_factor,
)
from ktonum.gradient_check.odd_fits import fit_odd

EPS = 2.0**-52


def half(phi: Callable[[float], float]) -> Callable[[float], float]:
    return lambda h: (phi(h) - phi(-h)) / 2.0


def domain_log(t: float) -> float:
    return math.log(1e-6 + t) if t > -1e-6 else math.nan


SMOOTH = [
    pytest.param(lambda t: math.exp(1.0 + t), math.e, math.e, 1e-9, id="exp"),
    pytest.param(lambda t: (1.0 + t) ** 7, 7.0, 1.0, 1e-9, id="polynomial"),
    pytest.param(lambda t: 1.0 / (1.0 + math.exp(-t)), 0.25, 0.5, 1e-9, id="sigmoid"),
    pytest.param(domain_log, 1e6, 14.0, 1e-5, id="log beside the edge of its domain"),
    pytest.param(lambda t: math.sin(1e6 * t), 1e6, 1.0, 1e-5, id="scale far below the first step"),
    pytest.param(lambda t: 1e8 + math.sin(1.0 + t), math.cos(1.0), 1e8, 1e-3, id="gradient 1e-8 of the value"),
    pytest.param(lambda t: abs(t - 1e-3) + 2.0 * math.sin(t), 1.0, 1.0, 1e-6, id="kink within the ladder"),
]


@pytest.mark.parametrize(("phi", "exact", "size", "relative"), SMOOTH)
def test_error_bar_holds_and_is_small(
    phi: Callable[[float], float], exact: float, size: float, relative: float
) -> None:
    estimate, taken = derivative(half(phi), noise_floor=EPS * size, size=size, most_levels=12)
    assert abs(estimate.value - exact) <= estimate.error_bar
    assert estimate.error_bar <= relative * abs(exact)
    assert len(taken) <= 12


def test_error_bar_follows_hidden_noise() -> None:
    # The bar must come from the values, because the given floor is 1e9 times too small.
    for seed in range(300):
        noise = np.random.default_rng(seed)

        def noisy(t: float, noise: np.random.Generator = noise) -> float:
            return math.exp(t) + 1e-7 * float(noise.standard_normal())

        estimate, _ = derivative(half(noisy), noise_floor=EPS, size=1.0)
        assert abs(estimate.value - 1.0) <= estimate.error_bar
        assert 1e-8 < estimate.noise < 1e-6
        assert estimate.converged


def test_bar_without_values_is_infinite() -> None:
    estimate = extrapolate([HalfDifference(0.5, math.nan), HalfDifference(0.25, 1.0)], noise_floor=EPS)
    assert math.isinf(estimate.error_bar)
    assert not estimate.converged
    assert estimate.levels == 1


def test_steps_too_far_apart_for_many_terms_are_fitted_with_few() -> None:
    """Steps of a gradient check of LayerNorm: differences at steps in between were NaN, and fifth powers singular."""
    steps = (
        6.103515625e-05,
        4.656612873077393e-10,
        5.820766091346741e-11,
        7.275957614183426e-12,
        9.094947017729282e-13,
    )
    differences = [HalfDifference(step, 236.5 * step) for step in steps]
    estimate = extrapolate(differences, noise_floor=1e-20)
    assert abs(estimate.value - 236.5) <= estimate.error_bar < 1e-3


def test_ladder_is_geometric_and_refuses_nonsense() -> None:
    assert ladder(2.0**-5, 3) == (2.0**-5, 2.0**-8, 2.0**-11)
    for top, levels, ratio in ((0.0, 3, 8.0), (1.0, 0, 8.0), (1.0, 3, 1.0), (math.nan, 3, 8.0)):
        with pytest.raises(ValueError, match="ladder"):
            ladder(top, levels, ratio)


def test_fit_recovers_exact_odd_polynomial() -> None:
    steps = ladder(0.5, 6)
    values = [3.0 * h - 2.0 * h**3 + 5.0 * h**5 for h in steps]
    value, unit_error, residual = fit_odd(steps, values, 3)
    assert value == pytest.approx(3.0, rel=1e-11)
    assert residual < 1e-28
    # Two terms cannot fit it, and the residual must show this.
    assert fit_odd(steps, values, 2)[2] > 1e-10
    assert unit_error > 0.0


def test_unit_error_is_the_standard_deviation_of_the_slope() -> None:
    steps = ladder(0.5, 5, 4.0)
    generator = np.random.default_rng(0)
    fits = [fit_odd(steps, generator.standard_normal(len(steps)).tolist(), 2) for _ in range(4000)]
    assert float(np.std([value for value, _, _ in fits])) == pytest.approx(fits[0][1], rel=0.05)


def test_student_factor_falls_with_freedom() -> None:
    factors = [student_factor(k) for k in range(1, 14)]
    assert factors == sorted(factors, reverse=True)
    # For two degrees of freedom and a risk r, exactly: t = (1 - r) / sqrt(r (2 - r) / 2).
    assert factors[1] == pytest.approx((1.0 - 1e-6) / math.sqrt(1e-6 * (2.0 - 1e-6) / 2.0), rel=1e-3)


def test_next_step_goes_up_for_noise_and_down_for_coarseness() -> None:
    generator = np.random.default_rng(1)
    steps = ladder(2.0**-5, 5)
    noisy = [HalfDifference(h, h + 1e-6 * float(generator.standard_normal())) for h in steps]
    assert next_step(noisy, extrapolate(noisy, noise_floor=EPS), size=1.0) == 2.0**-2
    coarse = [HalfDifference(h, math.sin(1e6 * h)) for h in steps]
    assert next_step(coarse, extrapolate(coarse, noise_floor=EPS), size=1.0) == steps[-1] / 8.0
    refused = [HalfDifference(2.0**-2, math.nan), *noisy]
    assert next_step(refused, extrapolate(refused, noise_floor=EPS), size=1.0) == steps[-1] / 8.0


def test_kink_at_the_point_is_told_from_curvature_and_noise() -> None:
    steps = ladder(2.0**-5, 6)
    assert kink_slope([(h, 3.0 * h + h * h) for h in steps]) == pytest.approx(3.0, rel=0.1)
    assert kink_slope([(h, h * h + 1e-16) for h in steps]) == 0.0
    assert kink_slope([(h, 0.0) for h in steps]) == 0.0
    assert kink_slope([(h, math.nan) for h in steps]) == 0.0


def test_sharpest_step_states_its_error() -> None:
    estimate, taken = derivative(half(math.exp), noise_floor=EPS, size=1.0)
    step, error = sharpest_step(taken, estimate)
    assert abs(half(math.exp)(step) / step - 1.0) <= error < 1e-6
