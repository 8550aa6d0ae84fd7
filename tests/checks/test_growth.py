"""The check `growth`: it names the way of accumulation, which is tested on sums that were made in each way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ktonum.auditing.judge import run_check
from ktonum.case.context import CaseContext
from ktonum.checks import Inapplicable
from ktonum.checks.growth import CHECK, LENGTHS, scheme
from ktonum.declare.op import Op
from ktonum.results import STANDARDS, Verdict
from subjects.op_defects import OPS
from subjects.planted import ALL
from subjects.small_ops import NORM_POINT, RMS_NORM, SOFTMAX_LOSS
from support.combinations import combinations

#: Number of sums of positive numbers: their root mean square error says more than one error.
_ROWS = 256


def _one_by_one(terms: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(terms.shape[0], dtype=dtype)
    for column in terms.unbind(1):
        total += column.to(dtype)
    return total


def _pairwise(terms: Tensor, dtype: torch.dtype) -> Tensor:
    level = terms.to(dtype)
    while level.shape[1] > 1:
        level = level[:, ::2] + level[:, 1::2]
    return level[:, 0]


def _errors(add: object, dtype: torch.dtype) -> list[float]:
    errors = []
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        terms = torch.rand(_ROWS, length, generator=generator).double()
        assert callable(add)
        exact = terms.sum(1)
        errors.append(float((add(terms, dtype).double() - exact).norm() / exact.norm()))
    return errors


@pytest.mark.parametrize(
    ("add", "dtype", "words"),
    [
        (_one_by_one, torch.float32, "as one by one in fp32"),
        # The error grows by a factor of 1.5 over these lengths, and chance may do the same.
        (_pairwise, torch.float32, "not growing"),
        (_one_by_one, torch.float16, "as one by one in fp16"),
        (_one_by_one, torch.bfloat16, "as one by one in bf16"),
    ],
)
def test_the_way_of_accumulation_is_recognised(add: object, dtype: torch.dtype, words: str) -> None:
    assert scheme(_errors(add, dtype), stored=torch.float32, accumulator=torch.float32) == words


def test_rounding_the_result_hides_the_way_of_accumulation() -> None:
    errors = [
        float((t := torch.rand(4096, dtype=torch.float64)).to(torch.bfloat16).double().sub(t).norm() / t.norm())
        for _ in LENGTHS
    ]
    assert scheme(errors, stored=torch.bfloat16, accumulator=torch.float32) == "hidden by rounding to bf16"


def test_errors_that_do_not_grow_are_called_not_growing() -> None:
    assert scheme([5e-8, 9e-8, 2e-7], stored=torch.float32, accumulator=torch.float32) == "as blocked in fp32"
    assert scheme([3e-7, 2e-7, 4e-7], stored=torch.float32, accumulator=torch.float32) == "not growing"
    assert scheme([float("nan"), 1.0, 1.0], stored=torch.float32, accumulator=torch.float32) == "not finite"


@combinations(
    "op, dtype, seed", [SOFTMAX_LOSS, RMS_NORM], ALL, range(3), ids=lambda value: getattr(value, "name", None)
)
def test_right_ops_stay_within_their_bounds_as_they_grow(op: Op, dtype: str, seed: int) -> None:
    # The seed follows from the case's name, and every dim is a part of the name.
    point = replace(op.points("quick")[0], dims={**op.points("quick")[0].dims, "N": 5 + seed})
    (case,) = replace(op, dims=[point]).cases(profile="quick", dtypes=[dtype], device="cpu")
    result = run_check(CHECK, CaseContext(op, case))
    assert result.verdict is Verdict.PASS and result.meets == STANDARDS, result.reason


@combinations(
    "held, dtype", itertools.product([name for name, op in OPS.items() if op.reductions], STANDARDS), ALL, ids=str
)
def test_the_ready_ops_stay_within_their_bounds_as_they_grow(held: tuple[str, str], dtype: str) -> None:
    name, standard = held
    op = OPS[name]
    right = op.with_candidate("upcast").candidate if standard == "precise" else op.reference
    (point,) = (p for p in op.points("quick") if "growth" in p.checks)
    # Other sizes than in the quick profile, and therefore other numbers.
    op = replace(op, candidate=right, dims=[replace(point, dims={**point.dims, "N": 6})])
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    result = run_check(CHECK, CaseContext(op, case), standard)
    assert result.verdict is Verdict.PASS and standard in result.meets and not result.vacuous, result.reason
    assert all(any(f"at {dim} = " in m.context for m in result.measurements) for dim in op.reductions)


def test_an_op_without_such_a_dim_is_inconclusive() -> None:
    op = replace(RMS_NORM, reductions=("K",), dims=[NORM_POINT])
    (case,) = op.cases(profile="quick", dtypes=["fp32"], device="cpu")
    with pytest.raises(Inapplicable, match="none of the dims that the op reduces over: K"):
        assert CHECK.probes is not None
        CHECK.probes(CaseContext(op, case))
