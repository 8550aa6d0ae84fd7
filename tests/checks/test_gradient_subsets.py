"""The subsets of inputs that the check `gradient_subsets` tries."""

from __future__ import annotations

import pytest

from ktonum.checks.gradient_subsets import proper_subsets


def test_every_proper_subset_of_few() -> None:
    assert proper_subsets(("x",)) == [()]
    assert proper_subsets(("x", "w")) == [(), ("x",), ("w",)]
    found = proper_subsets(("x", "w", "b", "c"))
    assert len(set(found)) == len(found) == 2**4 - 1
    assert ("x", "w", "b", "c") not in found


@pytest.mark.parametrize("count", [5, 9])
def test_none_each_alone_and_all_but_one_of_many(count: int) -> None:
    names = tuple("abcdefghi"[:count])
    found = proper_subsets(names)
    assert sorted(map(len, found)) == [0, *[1] * count, *[count - 1] * count]
    assert {set(names).difference(s).pop() for s in found if len(s) == count - 1} == set(names)
