"""The defect matrix: its judges judge, its page is about defects that exist, and a part comes out as written."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from planted import ALL

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "defect_matrix.md"


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("defect_matrix")


def _marks() -> dict[str, list[str]]:
    """Each judge's four marks by defect, from the committed page."""
    rows = PAGE.read_text("utf-8").partition("## Every defect")[2].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if "`" in row and row[0] == "|"]
    return {row[0]: [mark.strip("`") for mark in row[2:]] for row in cells}


def test_the_page_is_about_defects_that_exist(matrix: ModuleType) -> None:
    """All of them: a new one is not on it until the page is made again."""
    defects = matrix.planted_defects()
    names = [d.name for d in defects]
    assert len(set(names)) == len(names)
    assert set(_marks()) == set(names)
    assert len(_marks()) >= 60
    assert all(
        len(marks) == len(matrix.JUDGES) and {len(m) for m in marks} == {len(ALL)} for marks in _marks().values()
    )


def test_the_page_has_no_unexplained_miss() -> None:
    page = PAGE.read_text("utf-8")
    assert "not explained" not in page
    assert re.search(r"^\| ktonum \|( 0 of \d+ \|){4}$", page.partition("## False alarms")[2], re.MULTILINE)


# One that every value judge must see, one that rounding nearly hides, one of memory. What differs from run to run does
# so before the judges, too.
SAMPLE = (
    "kto: reference model ignored",
    "rms_norm: gradient scaled by 1.01",
    "softmax_loss: upstream gradient scaled in place",
)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_part_of_the_matrix_comes_out_as_written(matrix: ModuleType, name: str, dtype: str) -> None:
    (defect,) = (d for d in matrix.planted_defects() if d.name == name)
    row = matrix.examine(defect, dtype)
    written = [marks[ALL.index(dtype)] for marks in _marks()[name]]
    assert [matrix._MARKS[flagged] for flagged in row.flagged] == written


# What is more accurate than plain PyTorch in 16 bits is as far from it as that is from the truth; and in float32 plain
# PyTorch's largest error may be small by luck.
FALSE_ALARMS = {("assert_close", "bf16"), ("assert_close", "fp16"), ("2 × plain", "fp32")}


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("index", range(7))
def test_each_judge_flags_a_gross_defect_and_passes_a_correct_op(matrix: ModuleType, index: int, dtype: str) -> None:
    assert len(matrix.JUDGES) == 7
    judge = matrix.JUDGES[index]
    (defect,) = (d for d in matrix.planted_defects() if d.name == "kto: gradient's sign flipped")
    gross = judge.flags(matrix.Trial(matrix._context(defect.wrong, dtype)))
    correct = judge.flags(matrix.Trial(matrix._context(defect.right, dtype)))
    applies = {
        "gradcheck": ("fp64",),
        "gradcheck, fast": ("fp64",),
        "usual tolerances": ("bf16", "fp32"),
        "2 × plain": ("bf16", "fp16", "fp32"),
    }.get(judge.name, ALL)
    if dtype not in applies:
        assert gross is correct is None
        return
    assert gross is True
    assert correct is ((judge.name, dtype) in FALSE_ALARMS)


@pytest.mark.parametrize("dtype", ALL)
def test_the_size_of_a_defect_is_its_error_in_units_of_the_right_ones(matrix: ModuleType, dtype: str) -> None:
    by_name = {d.name: d for d in matrix.planted_defects()}
    assert matrix.size_of(by_name["softmax_loss: upstream gradient scaled in place"], dtype) <= matrix.FACTOR
    assert matrix.size_of(by_name["softmax_loss: gradient's sign flipped"], dtype) > 100
    assert math.isnan(matrix.size_of(by_name["softmax_loss: raises"], dtype))


def test_relative_error_by_hand(matrix: ModuleType) -> None:
    oracle = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    floor = torch.tensor([1.0, 2.0, 2.0 + 2.0**-10]).float()
    wrong = torch.tensor([1.0, 2.0, 2.0 + 2.0**-6]).float()
    assert matrix.relative_error(wrong, oracle, floor) == pytest.approx(16)
    # A right result without any error is granted one rounding: 2⁻²⁴ of the largest element, or of the norm.
    assert matrix.relative_error(wrong, oracle, oracle.float()) == pytest.approx(2.0**-6 / (2.0**-24 * 2))
    assert matrix.relative_error(oracle.float(), oracle, floor) == 0
    assert math.isinf(matrix.relative_error(torch.tensor([1.0, 2.0, math.nan]), oracle, floor))


def test_a_miss_must_be_explained(matrix: ModuleType) -> None:
    count = len(matrix.JUDGES)
    rows = [matrix.Row("a", "bf16", 4.0, (False,) * count), matrix.Row("b", "bf16", 2.0, (False,) * count)]
    assert matrix.missed_defects(rows) == rows[:1]
    assert matrix.explanation(rows[0]) is None
    page = matrix.document([matrix.Row("a", dtype, 4.0, (False,) * count) for dtype in ALL], [])
    assert page.count("not explained") == len(ALL)
