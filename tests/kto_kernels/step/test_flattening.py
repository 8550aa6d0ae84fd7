"""Dataclasses become flat lists and come back, under names that a schema can have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ktonum.kernels.step.flattening import Layout


@dataclass(frozen=True)
class Inner:
    weight: Tensor
    bias: Tensor | None
    size: int


@dataclass(frozen=True)
class Outer:
    weight: Tensor
    inner: Inner
    validate: bool
    other: Inner


@dataclass(frozen=True)
class Unfit:
    scale: float


LAYOUT = Layout(Outer)


def example() -> Outer:
    return Outer(torch.ones(1), Inner(torch.ones(2), None, 3), True, Inner(torch.ones(4), torch.ones(5), 6))


def test_the_fields_come_in_order_and_under_names_of_their_own() -> None:
    assert LAYOUT.schema == (
        "Tensor weight, Tensor inner_weight, Tensor? inner_bias, SymInt inner_size, bool validate, "
        "Tensor other_weight, Tensor? other_bias, SymInt other_size"
    )


def test_there_and_back_again() -> None:
    value = example()
    flat = LAYOUT.to_flat(value)
    assert flat == [
        value.weight,
        value.inner.weight,
        None,
        3,
        True,
        value.other.weight,
        value.other.bias,
        6,
    ]
    assert LAYOUT.from_flat(flat) == value
    assert LAYOUT.by_name(flat)["other_bias"] is value.other.bias


def test_a_list_of_another_length_is_refused() -> None:
    flat = LAYOUT.to_flat(example())
    for wrong in (flat[:-1], [*flat, 1]):
        with pytest.raises(ValueError, match="8 elements"):
            LAYOUT.from_flat(wrong)
        with pytest.raises(ValueError):
            LAYOUT.by_name(wrong)


def test_a_field_that_no_operator_takes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Unfit\.scale is a <class 'float'>"):
        Layout(Unfit)
