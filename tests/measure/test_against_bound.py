"""What is granted where the rounding of the right values itself is a bias: gradients near the smallest subnormal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ktonum.bounds import ErrorBound
from ktonum.measure.against_bound import GrantedErrors
from ktonum.results import BoundKind, BoundSource


def small_gradients() -> Tensor:
    """Of half float16's smallest number: rounding to nearest makes most of them zero. In two blocks of elements."""
    generator = torch.Generator().manual_seed(0)
    # Numbers of float32: PyTorch rounds float64 to float16 by way of it.
    return (torch.randn(2**21, generator=generator) * 3e-8).double()


def beyond(expected: Tensor, actual: Tensor) -> list[str]:
    zeros = torch.zeros_like(expected)
    granted = GrantedErrors(expected, ErrorBound(zeros, zeros, torch.float16, BoundSource(BoundKind.DERIVED)), 1.0)
    return [m.name for m in granted.measure("gradient", actual) if not m.within]


def test_one_rounding_of_the_right_values_is_granted_whatever_it_does_to_their_length() -> None:
    expected = small_gradients()
    actual = expected.half()
    bias = float(((actual.double() - expected) * expected).sum() / expected.square().sum())
    assert bias < -0.01, "else this shows nothing"
    assert not beyond(expected, actual)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_values_of_another_length_are_not(factor: float) -> None:
    expected = small_gradients()
    assert "gradient/signed_bias" in beyond(expected, (factor * expected).half())


def test_truncation_is_not_where_numbers_are_normal() -> None:
    expected = (small_gradients().float() * 1e6).double()
    assert not beyond(expected, expected.half())
    truncated = (expected.half().view(torch.int16) & -2).view(torch.float16)
    assert "gradient/signed_bias" in beyond(expected, truncated)
