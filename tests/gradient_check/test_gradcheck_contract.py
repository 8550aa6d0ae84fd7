"""Promises of the gradient check other than verdicts: its budget, layouts of inputs, errors and messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.results import Verdict
from support.gradcheck_functions import F64, draw, edited, failure, kto, kto_inputs


@pytest.mark.parametrize("budget", [10, 17, 32])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_budget_is_never_exceeded(budget: int, count: int) -> None:
    calls = []

    def fn(*inputs: Tensor) -> Tensor:
        calls.append(None)
        return torch.stack([x.sin().sum() for x in inputs]).exp()

    result = gradcheck(fn, [draw(k, 3) for k in range(count)], max_evaluations=budget, probes=3)
    assert len(calls) == result.evaluations <= budget
    assert result.localise_evaluations == 0


def test_same_seed_same_result() -> None:
    results = [gradcheck(lambda *i: kto(*i), kto_inputs(1), seed=s) for s in (4, 4, 5)]
    assert results[0] == results[1]
    assert results[0] != results[2]


def layouts() -> Iterator[Tensor]:
    base = draw(32, 6, 8).detach()
    yield base.T.clone().T
    yield base.T
    yield base[:, ::2]
    yield base[:1].expand(5, 8)
    yield base[0, :1].expand(4)
    yield base.as_strided((4, 3), (1, 1))
    yield base[2, 3]


@pytest.mark.parametrize("number", range(7))
def test_layouts_reach_fn_and_inputs_stay_untouched(number: int) -> None:
    x = list(layouts())[number].detach().requires_grad_()
    constant = draw(33, 3).detach()
    before, constant_before, seen = x.detach().clone(), constant.clone(), set()

    def fn(x: Tensor, constant: Tensor, factor: float) -> Tensor:
        seen.add(x.stride())
        return x.sin().sum() * constant.sum() * factor

    assert gradcheck(fn, (x, constant, 2.0)).verdict is Verdict.PASS
    assert torch.equal(x, before)
    assert torch.equal(constant, constant_before)
    assert x.grad is None
    if number in (0, 1, 2, 6):
        assert seen == {x.stride()}
    failure(lambda x, c, f: fn(edited(x, lambda g: g * 1.0001), c, f), (x, constant, 2.0))


def test_writing_to_inputs_is_refused() -> None:
    x, buffer = draw(34, 3), torch.zeros(3, dtype=F64)

    def visible(x: Tensor, buffer: Tensor) -> Tensor:
        buffer.add_(1.0)
        return x.exp()

    def hidden(x: Tensor, buffer: Tensor) -> Tensor:
        buffer.numpy()[0] = 7.0
        return x.exp()

    for fn in (visible, hidden):
        with pytest.raises(InputError, match="writes to its input 1"):
            gradcheck(fn, (x, buffer))
    assert torch.equal(buffer, torch.zeros(3, dtype=F64))


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (torch.ones(2, dtype=F64), {}, "requires_grad_"),
        ((1.0, "text"), {}, "requires_grad_"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"precision": "float8"}, "accepted are None, float64"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"max_evaluations": 9}, "at least 10"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"probes": 0}, "at least 10, 1 and 0"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"names": ("x", "y")}, "one name for each"),
    ],
)
def test_wrong_arguments_are_explained(inputs: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        gradcheck(lambda x, *rest: x * 2.0, inputs, **options)


def test_exceptions_of_fn_pass_through() -> None:
    def fn(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        gradcheck(fn, draw(35, 2))


def test_summary_names_place_measure_bar_power_and_next_step() -> None:
    text = failure(lambda *i: kto(i[0], edited(i[1], lambda g: 2 * g), i[2]), kto_inputs(2)).summary()
    for words in ("FAIL", "input 1", "finite difference", "error bar", "would have flagged", "Next:"):
        assert words in text
    assert "\n" not in text


def test_result_becomes_a_check_of_an_audit() -> None:
    names = ("input", "weight", "bias")
    good = gradcheck(lambda *i: kto(*i), kto_inputs(3), names=names).to_check_result(case="c", check="gradcheck")
    assert (good.verdict, good.vacuous, good.failed) == (Verdict.PASS, False, False)
    assert [m.name for m in good.measurements] == [f"grad_{name}/finite_difference" for name in names]
    assert all(m.within for m in good.measurements)
    bad = failure(lambda *i: kto(i[0], edited(i[1], lambda g: 2 * g), i[2]), kto_inputs(3), names=names)
    assert "the gradient of weight is wrong" in bad.reason
    record = bad.to_check_result(case="c", check="gradcheck")
    assert record.failed
    assert [m.within for m in record.measurements] == [True, False, True]
    assert record.worst is not None
    assert record.worst.name == "grad_weight/finite_difference"


def test_names_stay_with_their_inputs_beside_an_empty_one() -> None:
    inputs = (torch.zeros(0, dtype=F64, requires_grad=True), draw(36, 4))
    wrong = failure(lambda e, x: edited(x, lambda g: 2 * g).sin() + e.sum(), inputs, names=("empty", "x"))
    (measured,) = wrong.to_check_result(case="c", check="gradcheck").measurements
    assert measured.name == "grad_x/finite_difference"
