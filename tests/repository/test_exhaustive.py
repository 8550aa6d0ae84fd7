"""CONTRIBUTING.md lists what the default run leaves out, and the combinations that it keeps have every value."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from support.combinations import combinations, covering, few_or_many
from support.repository import ROOT

TESTS = ROOT / "tests"
#: A test file that leaves something out has one of these words.
WORDS = re.compile(r"\bmark\.exhaustive\b|@combinations\(|@few_or_many\(|\bin_dtypes\(|\bcovering\(")


def test_contributing_lists_the_files_that_leave_something_out() -> None:
    page = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:test_\w+(?:, )?)+) \|", page, re.MULTILINE)
    listed = [name for row in rows for name in row.split(", ")]
    leaving_out = {file.stem for file in TESTS.rglob("test_*.py") if WORDS.search(file.read_text(encoding="utf-8"))}
    assert len(listed) == len(set(listed)) and set(listed) == leaving_out - {Path(__file__).stem}


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(4,), (3, 3), (15, 4), (3, 4, 2), (2, 2, 2, 5)], ids=str)
def test_a_covering_has_every_choice_and_few_combinations(sizes: tuple[int, ...], strength: int) -> None:
    axes = [range(size) for size in sizes]
    everything = list(itertools.product(*axes))
    kept = [everything[place] for place in covering(axes, strength=strength)]
    for among in itertools.combinations(range(len(axes)), min(strength, len(axes))):
        wanted = set(itertools.product(*(axes[axis] for axis in among)))
        assert {tuple(combination[axis] for axis in among) for combination in kept} == wanted
    assert len(kept) == len(set(kept)) <= len(everything)
    if strength == 1:
        assert len(kept) == max(sizes)


def test_combinations_leave_out_what_is_not_covered_and_drop_nothing() -> None:
    parameters = combinations("size, name", [1, 2, 3], {"one": "a", "two": "b"}).args[1]
    assert [p.values for p in parameters] == list(itertools.product([1, 2, 3], ["a", "b"]))
    assert sum(not p.marks for p in parameters) == 3


def test_few_seeds_are_kept_and_many_are_exhaustive() -> None:
    few, many = few_or_many("seeds", 3, 100).args[1]
    assert few == 3 and many.values == (100,) and [mark.name for mark in many.marks] == ["exhaustive"]
