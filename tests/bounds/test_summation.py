"""Bounds on sums and inner products, compared with sums that are added in each order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ktonum.bounds import (
    PAIRWISE,
    SEQUENTIAL,
    Order,
    blocked,
    confidence,
    gamma,
    multiply_add_bound,
    probabilistic_gamma,
    split,
    stagnation_bias,
    sum_amplitude,
    sum_bound,
    sum_probable_bound,
    summation_variance,
)
from ktonum.errors import InputError
from subjects.rounded_sums import (
    LONG_DOUBLE_IS_LONGER,
    OPS,
    ORDERS,
    STORAGES,
    Subject,
    added,
    one_by_one_in,
    to_tf32,
    uses,
)
from support.combinations import combinations

U = 2.0**-24
BY_NAME = pytest.mark.parametrize("order", ORDERS, ids=lambda o: o.name)


def test_gamma_is_the_worst_that_n_factors_can_do() -> None:
    for n in (1, 10, 1000):
        grown = float((1 + Fraction(2) ** -11) ** n - 1)
        assert grown <= gamma(n, 2.0**-11) < grown * (1 + 2 * n * 2.0**-11)
    assert gamma(0, U) == 0.0
    with pytest.raises(InputError, match="n u must be below 1; use probabilistic_gamma"):
        gamma(2**24, U)
    with pytest.raises(InputError, match="pass a count of 0 or more"):
        gamma(-1, U)


@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_the_probabilistic_constant_is_exceeded_as_rarely_as_stated_and_not_never(rate: float) -> None:
    """Errors of the largest size each are the model's worst case. Hoeffding's inequality is loose by a small factor."""
    draw = np.random.default_rng(0)
    u, n = 2.0**-8, 200
    products = np.prod(1 + u * draw.choice([-1.0, 1.0], size=(20_000, n)), axis=1)
    share = float(np.mean(np.abs(products - 1) > probabilistic_gamma(n, u, confidence(false_alarm=rate))))
    assert rate / 40 < share <= rate
    assert probabilistic_gamma(n, u, 3.0) < gamma(n, u) / 3


@pytest.mark.parametrize(
    ("order", "terms", "depth", "run"),
    [
        (SEQUENTIAL, 1, 0, 1),
        (SEQUENTIAL, 100, 99, 100),
        (PAIRWISE, 1, 0, 1),
        (PAIRWISE, 64, 6, 2),
        (PAIRWISE, 65, 7, 2),
        (blocked(16), 64, 15 + 3, 16),
        (blocked(16), 70, 15 + 4, 16),
        (blocked(128), 50, 49, 50),
        (split(4), 64, 15 + 3, 16),
        (split(4), 66, 16 + 3, 17),
    ],
)
def test_depth_is_the_most_additions_of_a_term(order: Order, terms: int, depth: int, run: int) -> None:
    assert (order.depth(terms), order.run(terms)) == (depth, run)


@BY_NAME
@pytest.mark.parametrize("terms", [1, 2, 7, 64, 1000])
def test_there_are_as_many_partial_sums_as_additions(order: Order, terms: int) -> None:
    sums = order.partial_sums(terms)
    assert sum(sums.values()) == terms - 1
    assert all(1 < m <= terms for m in sums) and (terms == 1 or sums[terms] == 1)


def test_partial_sums_by_hand() -> None:
    assert dict(SEQUENTIAL.partial_sums(4)) == {2: 1, 3: 1, 4: 1}
    assert dict(PAIRWISE.partial_sums(8)) == {8: 1, 4: 2, 2: 4}
    assert dict(blocked(3).partial_sums(8)) == {2: 3, 3: 2, 6: 1, 8: 1}


@pytest.mark.parametrize("wrong", [lambda: blocked(0), lambda: split(-1), lambda: SEQUENTIAL.depth(0)])
def test_no_terms_and_no_parts_are_refused(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(InputError, match="pass 1 or more"):
        wrong()


@BY_NAME
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_amplitude_is_that_of_sums_in_random_order(order: Order, mean: float) -> None:
    """The root mean square of real errors is 0.42 amplitudes, see `test_bounds`. No error exceeds λ amplitudes."""
    draw = np.random.default_rng(3)
    values = torch.from_numpy((draw.standard_normal((1000, 500)) + mean).astype(np.float32))
    exact = torch.tensor([math.fsum(row) for row in values.tolist()], dtype=torch.float64)
    error = (added(values, order).double() - exact).abs()
    predicted = sum_amplitude(exact, values.double().square().sum(1), 500, order, U)
    assert 0.3 < float((error / predicted).square().mean().sqrt()) < 0.55
    assert bool((error <= confidence(1000) * predicted).all())
    absolute = values.double().abs().sum(1)
    worst, by_chance = sum_bound(absolute, 500, order, U), confidence(1000 * 500)
    probable = sum_probable_bound(absolute, 500, order, U, by_chance)
    assert bool((error <= torch.minimum(worst, probable)).all())
    # λ √h against h: the probabilistic bound is sharper if a term takes part in more than λ² additions.
    assert bool((probable < worst).all()) is (order.depth(500) > by_chance**2)


def test_the_older_closed_form_is_the_sequential_amplitude() -> None:
    for total, squares in ((0.0, 1000.0), (500.0, 333.0)):
        t, q = torch.tensor(total), torch.tensor(squares)
        closed = summation_variance(1000, t, q, torch.float32).sqrt()
        assert float(sum_amplitude(t.double(), q.double(), 1000, SEQUENTIAL, U)) == pytest.approx(
            float(closed), rel=5e-3
        )


def test_a_stagnating_sum_is_granted_what_it_loses_and_others_next_to_nothing() -> None:
    """A thousand numbers below the spacing of the first one."""
    terms = torch.full((1, 1001), 2.0**-26)
    terms[0, 0] = 1.0
    exact = float(terms.double().sum())
    lost = exact - float(added(terms, SEQUENTIAL)[0])
    assert lost == 1000 * 2.0**-26
    bounds = {o.name: float(stagnation_bias(terms.double(), o, U)[0]) for o in ORDERS}
    assert bounds["sequential"] >= lost
    assert bounds["pairwise"] < 0.01 * lost
    no_one_sign = torch.where(torch.arange(1001) % 2 == 0, terms, -terms).double()
    assert float(stagnation_bias(no_one_sign, SEQUENTIAL, U)[0]) < 0.01 * lost


@pytest.mark.parametrize("fused", [True, False])
def test_multiply_add_is_bounded_and_only_fused_by_one_rounding(fused: bool) -> None:
    draw = np.random.default_rng(5)
    a, b = draw.standard_normal((2, 4000)).astype(np.float32)
    c = (-a * b * (1 + 1e-3 * draw.standard_normal(4000))).astype(np.float32)  # they nearly cancel
    product = torch.from_numpy(a.astype(np.float64) * b.astype(np.float64))  # exact: 48 bits
    exact = product + torch.from_numpy(c.astype(np.float64))
    # A product of 48 bits plus a number of nearly its size is exact in float64. Rounding it once is the fused result.
    result = exact.float() if fused else torch.from_numpy(a * b + c)
    error = (result.double() - exact).abs()
    bounds = {f: multiply_add_bound(product, torch.from_numpy(c).double(), U, fused=f) for f in (True, False)}
    assert bool((error <= bounds[fused]).all())
    assert float((error / bounds[fused]).max()) > 0.5
    assert fused or bool((error > bounds[True]).any()), "no error is beyond the bound of one rounding"


LENGTHS = [2**6, 2**12, 2**17]


@combinations("op, storage, terms", list(OPS), STORAGES, LENGTHS)
def test_right_ops_use_between_a_thirtieth_and_all_of_their_tolerance(op: str, storage: str, terms: int) -> None:
    if storage == "fp64" and not LONG_DOUBLE_IS_LONGER:
        pytest.skip("this platform's long double has no more digits than float64")
    for data in ("zero mean", "positive") if op in ("sum", "inner product") else ("zero mean",):
        for order, share in uses(Subject(op, storage, terms, data)).items():
            assert 1 / 30 <= share <= 1.0, (order, data, share)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("op", "data"), [("sum", "zero mean"), ("inner product", "positive")])
def test_two_million_terms_use_as_much(op: str, data: str) -> None:
    for order, share in uses(Subject(op, "fp32", 2**21, data)).items():
        assert 1 / 30 <= share <= 1.0, (order, share)


@pytest.mark.parametrize("terms", [2**6, 2**12])
@pytest.mark.parametrize(
    ("storage", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float16)]
)
@pytest.mark.parametrize("op", ["sum", "inner product"])
def test_a_low_precision_accumulator_is_outside(op: str, storage: str, dtype: torch.dtype, terms: int) -> None:
    found = uses(Subject(op, storage, terms, "positive"), [SEQUENTIAL], accumulate=one_by_one_in(dtype))
    assert all(share > 1 for share in found.values()), found


@BY_NAME
@pytest.mark.parametrize("terms", LENGTHS)
def test_tf32_for_ieee_operands_is_outside(order: Order, terms: int) -> None:
    found = uses(Subject("inner product", "fp32", terms), [order], operands=to_tf32)
    assert all(share > 1 for share in found.values()), found
