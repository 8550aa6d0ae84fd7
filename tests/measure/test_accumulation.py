"""Sums, the worst element and elements that are not finite do not depend on the blocks."""

from __future__ import annotations

import math

import torch

from ktonum.measure.accumulation import ErrorSums, Nonfinite, Worst, same


def test_the_worst_of_all_blocks_has_its_place_among_all_elements() -> None:
    worst = Worst()
    for start, numbers in ((0, [0.5, 2.0]), (2, [[1.0, 0.0], [math.inf, 3.0]]), (6, [4.0])):
        worst.update(torch.tensor(numbers), start)
    assert worst == Worst(math.inf, 4)


def test_elements_that_differ_where_one_is_not_finite_are_counted_from_the_first_on() -> None:
    found = Nonfinite()
    usable = found.usable(torch.tensor([1.0, math.nan, math.inf]), torch.tensor([2.0, math.nan, math.inf]), 0)
    assert usable.tolist() == [True, False, False] and found == Nonfinite(0, 0)
    found.usable(torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), 3)
    found.usable(torch.tensor([math.nan]), torch.tensor([0.0]), 5)
    assert found == Nonfinite(2, 4)


def test_zero_over_zero_is_zero_and_other_numbers_over_zero_are_infinite() -> None:
    assert (ErrorSums().relative_norm, ErrorSums().signed_bias) == (0.0, 0.0)
    sums = ErrorSums()
    sums.add(torch.tensor([3.0]), torch.tensor([0.0]))
    assert (sums.relative_norm, sums.signed_bias) == (math.inf, 0.0)
    sums.add(torch.tensor([4.0]), torch.tensor([-2.0]))
    assert (sums.relative_norm, sums.signed_bias) == (2.5, -2.0)


def test_nan_is_the_same_as_nan() -> None:
    assert same(torch.tensor([math.nan, 1.0, math.inf]), torch.tensor([math.nan, 2.0, math.inf])).tolist() == [1, 0, 1]
