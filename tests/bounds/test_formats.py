"""Formats compared with torch's numbers: with every number of the formats of 8 and 16 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ktonum.bounds import BF16, E4M3, E5M2, FORMATS, FP16, FP32, FP64, TF32, Format, unit_roundoff

TORCH = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
NARROW = [f for f in (FP16, BF16, E4M3, E5M2)]


def numbers(form: Format) -> Tensor:
    """Every positive finite number of a format of 8 or 16 bits, float64, in order."""
    dtype = TORCH[form.name]
    bits = torch.finfo(dtype).bits
    patterns = torch.arange(2 ** (bits - 1), dtype=torch.int32).to(torch.int16 if bits == 16 else torch.uint8)
    found = patterns.view(dtype).double()
    return found[found.isfinite()]


@pytest.mark.parametrize("form", [FORMATS[name] for name in TORCH], ids=list(TORCH))
def test_precision_and_range_are_torchs(form: Format) -> None:
    info = torch.finfo(TORCH[form.name])
    assert form.unit_roundoff == info.eps / 2 == unit_roundoff(TORCH[form.name])
    assert form.largest == info.max
    assert form.smallest_normal == info.smallest_normal
    assert form.smallest_subnormal == info.smallest_normal * info.eps


def test_tf32_has_the_digits_of_fp16_and_the_range_of_fp32() -> None:
    assert TF32.unit_roundoff == FP16.unit_roundoff and TF32.smallest_normal == FP32.smallest_normal
    assert TF32.largest == 2.0**127 * (2 - 2.0**-10)
    assert float(TF32.round(torch.tensor(1 + 2.0**-10 + 2.0**-12))) == 1 + 2.0**-10


@pytest.mark.parametrize("form", NARROW, ids=lambda f: f.name)
def test_every_number_is_its_own_rounding_and_midpoints_go_to_even(form: Format) -> None:
    found = numbers(form)
    assert torch.equal(form.round(found), found) and torch.equal(form.round(-found), -found)
    middle = (found[1:] + found[:-1]) / 2
    # In ascending order, from zero on, every second number has an even last bit.
    even = torch.where(torch.arange(len(middle)) % 2 == 0, found[:-1], found[1:])
    assert torch.equal(form.round(middle), even)
    above, below = (torch.nextafter(middle, torch.full_like(middle, end)) for end in (math.inf, -math.inf))
    assert torch.equal(form.round(above), found[1:]) and torch.equal(form.round(below), found[:-1])


@pytest.mark.parametrize("form", NARROW, ids=lambda f: f.name)
def test_rounding_is_torchs_conversion(form: Format) -> None:
    draw = torch.Generator().manual_seed(form.digits)
    # All magnitudes, in float32, because torch converts float32 to 8 and 16 bits with one rounding.
    spread = torch.rand(200_000, generator=draw) * 2 - 1
    values = spread * 2.0 ** torch.randint(form.smallest_exponent - 12, 18, spread.shape, generator=draw).float()
    values = values[values.abs() <= form.largest].double()
    assert torch.equal(form.round(values), values.float().to(TORCH[form.name]).double())


@pytest.mark.parametrize(
    ("form", "last", "first"),
    [(FP16, 65519.99, 65520.0), (E5M2, 61439.9, 61440.0), (E4M3, 464.0, 464.1), (BF16, 3.3895e38, 3.4e38)],
    ids=lambda v: getattr(v, "name", ""),
)
def test_overflow_is_where_rounding_leaves_the_range(form: Format, last: float, first: float) -> None:
    """Overflow begins half a spacing beyond the largest number. A tie goes to even, which in E4M3 is 448 itself."""
    values = torch.tensor([last, first, -first], dtype=torch.float64)
    rounded = form.round(values)
    assert float(rounded[0]) == form.largest
    assert not rounded[1:].isfinite().any() and bool(rounded[1].isinf()) is form.infinite
    half = form.half_spacing(values)
    assert half.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("form", [FP32, TF32, *NARROW], ids=lambda f: f.name)
def test_half_a_spacing_bounds_every_rounding_and_is_reached(form: Format) -> None:
    draw = torch.Generator().manual_seed(7)
    exponents = torch.randint(form.smallest_exponent - form.digits, 8, (100_000,), generator=draw).double()
    values = torch.rand(100_000, generator=draw, dtype=torch.float64) * 2.0**exponents
    half, error = form.half_spacing(values), (form.round(values) - values).abs()
    assert bool((error <= half).all())
    normal = values >= form.smallest_normal
    assert bool((half[normal] <= form.unit_roundoff * values[normal]).all())
    assert set(half[values < form.smallest_normal].tolist()) == {form.smallest_subnormal / 2}
    middle = torch.tensor([1 + form.unit_roundoff, form.smallest_subnormal / 2], dtype=torch.float64)
    assert torch.equal((form.round(middle) - middle).abs(), form.half_spacing(middle))


def test_float64_is_what_everything_is_held_against() -> None:
    values = torch.tensor([1 / 3, 5e-324, 1.7e308], dtype=torch.float64)
    assert torch.equal(FP64.round(values), values)
    assert float(FP64.half_spacing(values[:1])) == 2.0**-55
