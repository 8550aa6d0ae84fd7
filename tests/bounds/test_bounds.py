"""Rounding-error bounds compared with simulated arithmetic: it stays within them, and comes near them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktonum.bounds import (
    EAGER,
    FALSE_ALARM,
    PRECISE,
    ErrorBound,
    amplitude,
    confidence,
    from_measured_error,
    summation_variance,
    unit_roundoff,
)
from ktonum.declare.cases import torch_dtype
from ktonum.measure.probe import bounded_probe
from ktonum.results import BoundKind, BoundSource
from subjects.planted import ALL

Floats = NDArray[np.float64]
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize(("dtype", "digits"), [("bf16", 8), ("fp16", 11), ("fp32", 24), ("fp64", 53)])
def test_unit_roundoff_is_half_the_gap_above_one(dtype: str, digits: int) -> None:
    assert unit_roundoff(torch_dtype(dtype)) == 2.0**-digits


def test_confidence_inverts_hoeffding() -> None:
    assert 2 * math.exp(-(confidence() ** 2) / 2) == pytest.approx(FALSE_ALARM)
    # A union bound: each of n tests may raise an n-th of the false alarms.
    assert 2 * math.exp(-(confidence(1000) ** 2) / 2) == pytest.approx(FALSE_ALARM / 1000)
    assert confidence(false_alarm=0.05) == pytest.approx(2.716, abs=1e-3)
    assert confidence(0) == confidence(1) < confidence(2)


def test_bounded_errors_stay_within_confidence() -> None:
    # Rademacher errors always have the size of their amplitude, which is the worst case of the model.
    generator = np.random.default_rng(0)
    amplitudes = generator.lognormal(size=64)
    sums = (generator.choice([-1.0, 1.0], size=(20_000, 64)) * amplitudes).sum(1)
    scale = np.sqrt((amplitudes**2).sum())
    for rate in (0.1, 0.01):
        alarms = float((np.abs(sums) > confidence(false_alarm=rate) * scale).mean())
        assert alarms <= rate
    # Hoeffding's inequality overestimates this rate about four times for a Gaussian sum. A bound for a rate of one in
    # ten that never raises an alarm would be useless.
    assert float((np.abs(sums) > confidence(false_alarm=0.1) * scale).mean()) > 0.1 / 20


DATA: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "positive": lambda g, n: g.random(n),
    "long-tailed": lambda g, n: g.lognormal(size=n),
    "zero mean": lambda g, n: g.standard_normal(n),
    "shifted": lambda g, n: g.standard_normal(n) + 0.2,
}


def _added_one_by_one(terms: NDArray[np.float32]) -> NDArray[np.float32]:
    total = np.zeros(terms.shape[0], np.float32)
    for column in terms.T:
        total += column
    return total


@pytest.mark.parametrize("terms", [64, 1000, 4096])
@pytest.mark.parametrize("data", DATA)
def test_summation_variance_is_that_of_sequential_sums(data: str, terms: int) -> None:
    generator = np.random.default_rng(terms)
    values = DATA[data](generator, terms).astype(np.float32)
    orders = np.stack([generator.permutation(values) for _ in range(300)])
    exact = values.astype(np.float64)
    error = _added_one_by_one(orders) - exact.sum()
    total, squares = torch.tensor(exact.sum()), torch.tensor((exact**2).sum())
    predicted = math.sqrt(float(summation_variance(terms, total, squares, torch.float32)))
    # The prediction uses the largest error of each rounding, u |s|. If errors are uniform up to half a unit in the last
    # place, their root mean square is 1/√3 of it just above a power of two, and half of that just below the next one:
    # 0.58 to 0.29, on average 0.42.
    assert 0.25 < math.sqrt(float((error**2).mean())) / predicted < 0.62
    assert float(np.abs(error).max()) < confidence(300) * predicted


@pytest.mark.parametrize("rising", [0.5, 0.6, 0.9])
def test_summation_variance_of_stretches_of_either_sign_knows_their_peak(rising: float) -> None:
    # As in KTO: the gradients of desirable sequences have one sign, those of the undesirable ones after them the other.
    n, generator = 4096, np.random.default_rng(7)
    first = int(rising * n)
    sign = np.where(np.arange(n) < first, 1.0, -first / (n - first) * 0.8)
    orders = (generator.random((300, n)) * sign).astype(np.float32)
    exact = orders.astype(np.float64)
    error = _added_one_by_one(orders) - exact.sum(1)
    total, squares = (torch.from_numpy(t) for t in (exact.sum(1), (exact**2).sum(1)))
    peak = torch.from_numpy(exact[:, :first].sum(1))
    knowing = summation_variance(n, total, squares, torch.float32, peak=peak)
    unknowing = summation_variance(n, total, squares, torch.float32)
    rms = math.sqrt(float((error**2).mean()))
    assert 0.25 < rms / math.sqrt(float(knowing.mean())) < 0.62
    assert rms > 1.2 * math.sqrt(float(unknowing.mean()))


def test_summation_variance_tells_one_sign_from_zero_mean() -> None:
    # The plain bound n u Σ|t| does not distinguish them. It is √n too large for zero mean.
    n = 10_000
    one_sign = summation_variance(n, torch.tensor(float(n)), torch.tensor(float(n)), torch.float32)
    zero_mean = summation_variance(n, torch.tensor(0.0), torch.tensor(float(n)), torch.float32)
    assert float(one_sign / zero_mean) == pytest.approx(2 * n, rel=1e-3)


def _every_number(dtype: torch.dtype) -> Tensor:
    """Every positive finite number of a 16-bit dtype. Of float32: numbers around each power of two, and subnormals."""
    integer = _INTEGERS[dtype]
    if torch.finfo(dtype).bits == 16:
        patterns = torch.arange(1, 2**15, dtype=integer)
    else:
        steps = torch.tensor([-2, -1, 0, 1, 2, 12345])
        patterns = (torch.arange(1, 255)[:, None] * 2**23 + steps).flatten().to(integer)
        patterns = torch.cat([torch.tensor([1, 2, 3, 2**22, 2**23 - 1, 255 * 2**23 - 1], dtype=integer), patterns])
    numbers = patterns.view(dtype)
    return numbers[numbers.isfinite()]


def _neighbour(numbers: Tensor) -> Tensor:
    """The next larger number of the dtype, or infinity after the largest: its bit pattern is the next integer."""
    return (numbers.view(_INTEGERS[numbers.dtype]) + 1).view(numbers.dtype)


def _final_rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros_like(expected)
    return ErrorBound(zero, zero, dtype, BoundSource(BoundKind.DERIVED)).final_rounding(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_final_rounding_is_half_the_gap_at_every_number(dtype: torch.dtype) -> None:
    numbers = _every_number(dtype)
    neighbours = _neighbour(numbers).double()
    inner = neighbours.isfinite()
    here = numbers.double()
    half = _final_rounding(here, dtype)
    assert torch.equal(half[inner], ((neighbours - here) / 2)[inner])
    assert torch.equal(_final_rounding(-here, dtype), half)
    # At the largest finite number, the gap is the one below it.
    assert torch.equal(half[~inner], half.amax().view(1))


def test_final_rounding_of_float64_is_that_of_numpy() -> None:
    numbers = np.array([5e-324, 1e-310, 2.2e-308, 1e-200, 1 - 2**-53, 1.0, 1.5, 3.0, 2.0**52, 1e300])
    half = _final_rounding(torch.tensor(numbers), torch.float64)
    # Half of the smallest subnormal cannot be represented. It becomes zero, so no rounding error is allowed there.
    assert np.array_equal(half.numpy(), np.spacing(numbers) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_nearest_never_exceeds_final_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = _every_number(dtype)
    neighbours = _neighbour(numbers).double()
    here, neighbours = numbers[neighbours.isfinite()].double(), neighbours[neighbours.isfinite()]
    between = here + torch.rand(here.shape, generator=generator, dtype=torch.float64) * (neighbours - here)
    if dtype is not torch.float32:
        between = between.float().double()  # torch rounds float64 to 16 bits twice, through float32
    error = (between.to(dtype).double() - between).abs()
    assert bool((error <= _final_rounding(between, dtype)).all())
    middle = (here + neighbours) / 2
    # Midpoints reach it, so it is no larger than necessary.
    assert torch.equal((middle.to(dtype).double() - middle).abs(), _final_rounding(middle, dtype))


def test_final_rounding_at_zero_is_that_of_the_smallest_subnormal() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        smallest = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        assert float(_final_rounding(torch.zeros(1, dtype=torch.float64), dtype)) == smallest / 2


def _truncated(values: Floats) -> NDArray[np.float32]:
    """Float64 rounded to float32 towards zero."""
    nearest = values.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


@pytest.mark.parametrize("terms", [256, 1024, 4096, 16384])
def test_truncation_is_twice_that_of_a_truncating_accumulator(terms: int) -> None:
    generator = np.random.default_rng(terms)
    # Sums of many sizes, so that their leading digits are spread as the prediction assumes.
    x = (generator.random((1000, terms)) * generator.lognormal(size=(1000, 1))).astype(np.float16).astype(np.float64)
    y = generator.random(terms).astype(np.float16).astype(np.float64)
    steps = (x * y).reshape(1000, terms // 16, 16).sum(-1)
    total = np.zeros(1000, np.float32)
    for step in steps.T:
        total = _truncated(total + step)
    shrinkage = float((1 - total / (x * y).sum(1)).mean())
    granted = PRECISE.arithmetic(torch.float16, "cuda").truncation(terms)
    assert 0.48 < shrinkage / granted < 0.55


def test_truncation_is_granted_to_tensor_cores_alone() -> None:
    for dtype in ALL:
        granted = {d: PRECISE.arithmetic(torch_dtype(dtype), d).truncation(4096) for d in ("cpu", "cuda")}
        assert granted["cpu"] == 0.0
        assert (granted["cuda"] > 0.0) is (dtype in ("bf16", "fp16"))


@pytest.mark.parametrize("dtype", ALL)
def test_what_the_standards_grant(dtype: str) -> None:
    asked = torch_dtype(dtype)
    precise, eager = (standard.arithmetic(asked, "cpu") for standard in (PRECISE, EAGER))
    wide = torch.float64 if dtype == "fp64" else torch.float32
    assert precise.accumulator is eager.accumulator is precise.stored is wide
    assert precise.operands is eager.operands is eager.stored is asked


def test_a_measured_bound_is_no_smaller_than_the_typical_error() -> None:
    expected = torch.zeros(4, dtype=torch.float64)
    independent, coherent = from_measured_error(actual=torch.tensor([0.0, 0.0, 0.0, 4.0]), expected=expected, scale=3.0)
    assert independent.tolist() == [6.0, 6.0, 6.0, 12.0]  # root mean square 2, largest 4
    assert not coherent.any()


def test_a_measured_bound_grants_nothing_for_what_has_no_value() -> None:
    expected = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    independent, _ = from_measured_error(actual=torch.tensor([math.nan, 1.5]), expected=expected, scale=1.0)
    assert bool(independent.isfinite().all())


def test_a_missing_stand_in_bounds_nothing() -> None:
    expected = torch.ones(3, dtype=torch.float64)
    independent, _ = from_measured_error(actual=torch.full((3,), math.nan), expected=expected, scale=1.0)
    assert bool(independent.isnan().all())  # every comparison with NaN fails


def test_an_amplitude_whose_square_underflows_is_not_zero() -> None:
    variance = torch.tensor([4.0, 0.0, 1e-300], dtype=torch.float64)
    floor = float(amplitude(torch.zeros((), dtype=torch.float64)))
    assert 1e-162 < floor < 1e-161 and floor**2 > 0.0
    assert amplitude(variance).tolist() == [2.0, floor, 1e-150]


def test_a_large_element_is_granted_in_proportion_and_a_small_one_the_usual() -> None:
    # One element is a hundred times the others, and its own error happens to be zero.
    expected = torch.ones(100, dtype=torch.float64)
    expected[0] = 100.0
    actual = expected + 1e-3
    actual[0] = 100.0
    independent, _ = from_measured_error(actual=actual, expected=expected, scale=1.0)
    usual = math.sqrt(99 * 1e-6 / 100)
    assert float(independent[0]) == pytest.approx(usual * 100 / math.sqrt((100**2 + 99) / 100), rel=1e-6)
    assert independent[1:].tolist() == pytest.approx([1e-3] * 99, rel=1e-6)


def test_an_infinite_bound_excuses_anything() -> None:
    expected = torch.ones(4, dtype=torch.float64)
    bound = ErrorBound(
        torch.full_like(expected, math.inf), torch.zeros_like(expected), torch.float32, BoundSource(BoundKind.DERIVED)
    )
    probe = bounded_probe("y", actual=torch.tensor([7.0, math.nan, 1.0, 1.0]), expected=expected, bound=lambda _: bound)
    assert all(m.within for m in probe.measure(probe.actual, "eager"))


@pytest.mark.parametrize("size", [1e-170, 1e-235, 1e-310])
def test_a_bias_of_numbers_whose_squares_underflow_is_measured_or_left_out(size: float) -> None:
    expected = torch.full((100,), size, dtype=torch.float64)
    bound = ErrorBound(expected * 1e-15, torch.zeros_like(expected), torch.float64, BoundSource(BoundKind.DERIVED))
    probe = bounded_probe("y", actual=expected, expected=expected, bound=lambda _: bound)
    assert all(m.within for m in probe.measure(expected, "precise"))
    measured = {m.name for m in probe.measure(expected, "precise")}
    assert ("y/signed_bias" in measured) == (size > 1e-300)
    assert not all(m.within for m in probe.measure(expected * 1.01, "precise"))
