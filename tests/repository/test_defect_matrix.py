"""The defect matrix: its judges work, its page has all defects, and parts of it come out as written again."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from ktonum.bounds import FUNCTION_ERROR
from subjects.planted import ALL
from support.combinations import combinations
from support.repository import ROOT

PAGE = ROOT / "docs" / "defect_matrix.md"


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return importlib.import_module("defect_matrix")


def _marks() -> dict[str, list[str]]:
    """Each judge's four marks by defect, from the committed page."""
    rows = PAGE.read_text("utf-8").partition("## Every defect")[2].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if "`" in row and row[0] == "|"]
    return {row[0]: [mark.strip("`") for mark in row[2:]] for row in cells}


def test_the_page_has_every_defect_and_every_judge(matrix: ModuleType) -> None:
    """After a change to either, the page must be written again."""
    names = [d.name for d in matrix.planted_defects()]
    assert len(set(names)) == len(names)
    assert set(_marks()) == set(names)
    assert all(
        len(marks) == len(matrix.JUDGES) and {len(m) for m in marks} == {len(ALL)} for marks in _marks().values()
    )
    counted = re.findall(r"(\d+) planted defects", (ROOT / "README.md").read_text("utf-8"))
    assert {int(count) for count in counted} <= {len(names)}


# A defect that every judge of values must see, one that rounding nearly hides, and one in memory. No defect that
# differs from run to run, because its marks may differ, too.
SAMPLE = (
    "kto: reference model ignored",
    "rms_norm: gradient scaled by 1.01",
    "softmax_loss: upstream gradient scaled in place",
)


@combinations("name, dtype", SAMPLE, ALL)
def test_a_part_of_the_matrix_comes_out_as_written(matrix: ModuleType, name: str, dtype: str) -> None:
    (defect,) = (d for d in matrix.planted_defects() if d.name == name)
    row = matrix.examine(defect, dtype)
    written = [marks[ALL.index(dtype)] for marks in _marks()[name]]
    assert [matrix._MARKS[flagged] for flagged in row.flagged] == written


# In 16 bits, a candidate that is more accurate than plain PyTorch is as far from it as plain PyTorch is from the truth.
# In float32, the largest error of plain PyTorch may be small by luck.
FALSE_ALARMS = {("assert_close", "bf16"), ("assert_close", "fp16"), ("2 × plain", "fp32")}


@combinations("index, dtype", range(7), ALL)
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
    assert matrix.sizes_of(by_name["softmax_loss: upstream gradient scaled in place"], dtype)[1] <= matrix.FACTOR
    assert matrix.sizes_of(by_name["softmax_loss: gradient's sign flipped"], dtype)[0] > 100
    assert all(map(math.isnan, matrix.sizes_of(by_name["softmax_loss: raises"], dtype)))


def test_relative_error_by_hand(matrix: ModuleType) -> None:
    oracle = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    floor = torch.tensor([1.0, 2.0, 2.0 + 2.0**-10]).float()
    wrong = torch.tensor([1.0, 2.0, 2.0 + 2.0**-6]).float()
    assert matrix.relative_error(wrong, oracle, floor) == pytest.approx(16)
    # If the right result has no error, the divisor is one rounding: 2⁻²⁴ of the largest element, or of the norm.
    assert matrix.relative_error(wrong, oracle, oracle.float()) == pytest.approx(2.0**-6 / (2.0**-24 * 2))
    assert matrix.relative_error(oracle.float(), oracle, floor) == 0
    assert math.isinf(matrix.relative_error(torch.tensor([1.0, 2.0, math.nan]), oracle, floor))


def test_the_page_names_a_miss_and_one_that_is_a_miss_by_luck(matrix: ModuleType) -> None:
    count = len(matrix.JUDGES)
    rows = [matrix.Row("a", "bf16", 4.0, 4.0, (False,) * count), matrix.Row("b", "bf16", 2.0, 4.0, (False,) * count)]
    assert matrix.missed_defects(rows) == rows[:1]
    rows += [replace(row, dtype=dtype) for row in rows for dtype in ALL[1:]]
    page = matrix.document(rows, [])
    assert page.count("\n- a, ") == len(ALL) and "Nothing." not in page
    assert page.count(": 4 times that, 2 times the floor") == len(ALL)
    assert "Nothing." in matrix.document([replace(row, size=2.0) for row in rows], [])


def test_at_its_limits_pytorch_adds_one_by_one_and_errs_as_much_as_allowed(matrix: ModuleType) -> None:
    terms = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    one_by_one = terms[0].clone()
    for term in terms[1:]:
        one_by_one += term
    in_bfloat16 = terms.bfloat16().sum()
    a, b = terms[:600].view(20, 30), terms[600:2100].view(30, 50)
    with matrix.AtItsLimits("test") as limits:
        assert torch.equal(terms.sum(), one_by_one) and torch.equal(terms.mean(), one_by_one / 4000)
        assert torch.equal(terms.view(40, 100).sum(1), torch.stack([row.sum() for row in terms.view(40, 100)]))
        product, sigmoid = a @ b, terms.sigmoid()
        log_softmax = terms.log_softmax(0)
        assert torch.equal(terms.bfloat16().sum(), in_bfloat16)
    assert len(limits.handled) == 6
    rounding = 2.0**-24
    assert 0 < float((product - a @ b).abs().max()) < 30 * rounding * float((a @ b).max())
    error = (sigmoid.double() / terms.double().sigmoid() - 1).abs() / rounding
    assert 1.5 < float(error.max()) < 1.01 * FUNCTION_ERROR
    exact = terms.double().log_softmax(0)
    assert 1e-7 < float((log_softmax.double() - exact).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", ALL)
def test_the_floor_is_no_less_than_the_planted_implementations_own(matrix: ModuleType, dtype: str) -> None:
    for defect in (d for d in matrix.planted_defects() if d.name.endswith("16 roundings")):
        size, alone = matrix.sizes_of(defect, dtype)
        assert 0 < size <= alone
        # In float64 the implementation repeats the oracle. In float32 it may by chance have the largest error of all.
        assert dtype != "fp64" or size < 0.95 * alone
