"""Granted errors near the smallest subnormal, where rounding the right values once causes a bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ktonum.bounds import ErrorBound
from ktonum.measure.against_bound import GrantedErrors
from ktonum.results import BoundKind, BoundSource


def small_gradients() -> Tensor:
    """Values near half of float16's smallest number, mostly rounded to zero, and too many to be kept."""
    generator = torch.Generator().manual_seed(0)
    # Float32 numbers, because PyTorch rounds float64 to float32 before it rounds to float16.
    return (torch.randn(2**21, generator=generator) * 3e-8).double()


def beyond(expected: Tensor, actual: Tensor) -> list[str]:
    zeros = torch.zeros_like(expected)
    granted = GrantedErrors(expected, ErrorBound(zeros, zeros, torch.float16, BoundSource(BoundKind.DERIVED)), 1.0)
    return [m.name for m in granted.measure("gradient", actual) if not m.within]


def test_one_rounding_of_the_right_values_is_granted_although_it_changes_their_norm() -> None:
    expected = small_gradients()
    actual = expected.half()
    bias = float(((actual.double() - expected) * expected).sum() / expected.square().sum())
    assert bias < -0.01, "else this shows nothing"
    assert not beyond(expected, actual)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_scaled_values_are_not_granted(factor: float) -> None:
    expected = small_gradients()
    assert "gradient/signed_bias" in beyond(expected, (factor * expected).half())


def test_truncation_of_normal_numbers_is_not_granted() -> None:
    expected = (small_gradients().float() * 1e6).double()
    assert not beyond(expected, expected.half())
    truncated = (expected.half().view(torch.int16) & -2).view(torch.float16)
    assert "gradient/signed_bias" in beyond(expected, truncated)
