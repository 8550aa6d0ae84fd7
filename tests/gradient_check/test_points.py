"""Points where finite differences are hard: edges of domains, extreme numbers, jumps, kinks and infinities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.results import Verdict
from support.gradcheck_functions import F64, draw, edited, failure


def doubled(x: Tensor) -> Tensor:
    return edited(x, lambda g: 2.0 * g)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=True)


def raising(x: Tensor, variance: Tensor) -> Tensor:
    if bool((variance < 0.0).any()):
        raise ValueError("variance must not be negative")
    return x * (variance + 1e-5).rsqrt()


DOMAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "raises below 0": raising,
    "NaN below 0": lambda x, v: x * v.sqrt(),
    "log": lambda x, v: x + v.log(),
    "pow": lambda x, v: x * v**1.5,
}


@pytest.mark.parametrize("name", DOMAINS)
def test_inputs_that_must_not_become_negative(name: str) -> None:
    fn = DOMAINS[name]
    # Of very different size: a step in the unit of the largest carries the smallest out of the domain.
    variance = leaf(1.0, 1e-3, 1e-6, 2.0)
    assert gradcheck(fn, (draw(0, 4), variance))
    assert failure(lambda x, v: fn(x, doubled(v)), (draw(0, 4), variance)).worst_input == 1
    assert failure(lambda x, v: fn(doubled(x), v), (draw(0, 4), variance)).worst_input == 0


def test_a_function_that_is_defined_nowhere_around_is_inconclusive() -> None:
    x = leaf(1.0, 2.0)
    at = x.detach().clone()

    def fn(x: Tensor) -> Tensor:
        if not torch.equal(x.detach(), at):
            raise ValueError("only here")
        return x.exp()

    result = gradcheck(fn, x, raise_exception=False)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "only here" in result.reason


@pytest.mark.parametrize("size", [1e-310, 1e-300, 1e-150, 1e150, 1e300, 1.7e308])
def test_extreme_inputs(size: float) -> None:
    x = leaf(size, -0.5 * size, 0.25 * size)
    for fn in (lambda x: x * 0.5, lambda x: x.abs()):
        assert gradcheck(fn, x), size
        failure(lambda x, fn=fn: fn(doubled(x)), x)


@pytest.mark.parametrize("fn", [torch.floor, torch.ceil, torch.round, torch.sign, torch.trunc])
def test_rounding_has_a_gradient_of_zero(fn: Callable[[Tensor], Tensor]) -> None:
    x = leaf(0.3, -1.4, 2.6, 0.7)
    assert gradcheck(fn, x)

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return fn(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    failure(StraightThrough.apply, x)


def test_jumps_far_away_hide_no_defect() -> None:
    x = leaf(0.4, -1.3, 12.6, 0.98)
    assert gradcheck(torch.frac, x)
    failure(lambda x: torch.frac(edited(x, lambda g: 1.001 * g)), x)


def test_a_gradient_of_zero_up_to_rounding_beside_jumps() -> None:
    x = leaf(-0.5363, 0.8425, 0.0085, -0.6196, 0.0582)
    assert gradcheck(lambda x: torch.nn.functional.normalize(x[:, None], dim=1), x)


def test_functions_that_jump_close_to_the_point() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, generator=generator, dtype=F64).requires_grad_() for _ in range(2))

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.remainder(a, 0.05 * (b + 0.1 * b.sign()))

    assert gradcheck(fn, (a, b))
    assert failure(lambda a, b: fn(edited(a, lambda g: 1.001 * g), b), (a, b)).worst_input == 0
    assert failure(lambda a, b: fn(a, edited(b, lambda g: 1.001 * g)), (a, b)).worst_input == 1


def test_a_target_that_is_compared_for_equality() -> None:
    x, target = draw(1, 4), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)

    def fn(x: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.hinge_embedding_loss(x, target, margin=3.0)

    assert gradcheck(fn, (x, target))
    failure(lambda x, t: fn(doubled(x), t), (x, target))
    # Where the target itself is to be differentiated there is a jump. The other input's defect is found all the same.
    both = (x, target.clone().requires_grad_())
    assert gradcheck(fn, both, raise_exception=False).verdict is not Verdict.FAIL
    assert failure(lambda x, t: fn(doubled(x), t), both).worst_input == 0


def test_infinite_inputs_stay_where_they_are() -> None:
    x = leaf(1.0, torch.inf, -0.5, -torch.inf)
    result = gradcheck(torch.sigmoid, x)
    assert "2 of its elements are not finite" in result.inputs[0].reason
    failure(lambda x: torch.sigmoid(doubled(x)), x)
    assert gradcheck(lambda x: torch.logsumexp(x, 0), leaf(1.0, -torch.inf, 0.5))


def test_only_infinite_inputs_are_inconclusive() -> None:
    result = gradcheck(torch.sigmoid, leaf(torch.inf, torch.nan), raise_exception=False)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "no element is finite" in result.reason


def test_empty_tensors_have_nothing_to_check() -> None:
    empty = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    result = gradcheck(torch.sin, empty)
    assert "empty" in result.reason
    assert gradcheck(lambda a, b: a.sum() + b.exp(), (empty, draw(2, 3)))
    failure(lambda a, b: a.sum() + doubled(b).exp(), (empty, draw(2, 3)))
    assert gradcheck(lambda x: x[:0], draw(2, 3))


@pytest.mark.parametrize("fn", [torch.relu, torch.abs, lambda x: x.clamp(0.0, 1.0), lambda x: torch.maximum(x, -x)])
def test_a_kink_is_inconclusive_and_beside_it_the_check_works(fn: Callable[[Tensor], Tensor]) -> None:
    x = leaf(0.0, 0.3, -0.4)
    assert gradcheck(lambda x: edited(fn(x), lambda g: g), x, raise_exception=False).verdict is not Verdict.FAIL
    beside = leaf(1e-4, 0.3, -0.4)
    assert gradcheck(fn, beside)
    failure(lambda x: fn(doubled(x)), beside)


def test_large_cumulative_sums() -> None:
    x = (draw(3, 6).detach() * 10_000.0).requires_grad_()
    assert gradcheck(lambda x: torch.logcumsumexp(x, 0), x)
    failure(lambda x: torch.logcumsumexp(doubled(x), 0), x)


def test_outputs_of_very_different_sizes() -> None:
    assert gradcheck(lambda x: (x.exp() * 1e200, x.sin() * 1e-200), draw(4, 3))
    failure(lambda x: (x.exp() * 1e200, doubled(x).sin() * 1e-200), draw(4, 3))
