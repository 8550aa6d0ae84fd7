"""Second derivatives: the gradients of gradients, wrong where the first are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.gradient_check.gradcheck_error import GradcheckError
from ktonum.gradient_check.gradgradcheck import gradgradcheck
from ktonum.results import Verdict
from support.gradcheck_functions import draw, edited, kto, kto_inputs


class Sine(torch.autograd.Function):
    """``sin(x)``, right in its first derivative. The second is that of a sine of another phase."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        frozen = x.detach()
        return grad * (frozen.cos() + 0.5 * (x.cos() - frozen.cos()))


class Frozen(torch.autograd.Function):
    """``sin(x)``, whose backward hides from autograd that it depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.cosine = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.cosine.conj()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * ctx.cosine


RIGHT: dict[str, Callable[..., Any]] = {
    "sin": torch.sin,
    "two outputs": lambda x: (x.exp(), x.pow(3).sum()),
    "beside an output without gradient": lambda x: (x.exp(), x.detach(), 3),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    "options", [{}, {"check_fwd_over_rev": True}, {"check_batched_grad": True}, {"gen_non_contig_grad_outputs": True}]
)
def test_right_second_derivatives_pass(name: str, options: dict[str, bool]) -> None:
    assert gradgradcheck(RIGHT[name], draw(0, 3), **options)


def test_several_inputs() -> None:
    assert gradgradcheck(lambda *inputs: kto(*inputs), kto_inputs(0))


@pytest.mark.parametrize("fn", [Sine.apply, Frozen.apply])
def test_right_first_and_wrong_second_derivatives(fn: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(fn, draw(1, 3))
    with pytest.raises(GradcheckError, match="of the gradients, the gradient of input 0 is wrong") as caught:
        gradgradcheck(fn, draw(1, 3))
    assert caught.value.result.worst_input == 0
    result = gradgradcheck(fn, draw(1, 3), raise_exception=False)
    assert result.verdict is Verdict.FAIL
    assert [entry.name for entry in result.inputs] == ["input 0", "grad_output[0]"]


def test_complex_second_derivatives() -> None:
    z = torch.randn(3, generator=torch.Generator().manual_seed(2), dtype=torch.complex128).requires_grad_()
    assert gradgradcheck(lambda z: z.exp() * z.conj(), z)
    assert not gradgradcheck(Frozen.apply, z, raise_exception=False)


def test_forward_over_reverse_alone() -> None:
    options = {"check_fwd_over_rev": True, "check_rev_over_rev": False}
    assert gradgradcheck(torch.sin, draw(3, 3), **options)
    assert not gradgradcheck(Frozen.apply, draw(3, 3), raise_exception=False, **options)


def test_gradients_of_outputs_can_be_given() -> None:
    x, given = draw(4, 3), draw(5, 3)
    result = gradgradcheck(torch.sin, x, given)
    assert [entry.name for entry in result.inputs] == ["input 0", "grad_output[0]"]
    # One that does not require grad is not differentiated.
    assert len(gradgradcheck(torch.sin, x, (given.detach(),)).inputs) == 1


def test_nondet_tol_is_that_of_the_first_backward_too() -> None:
    noise = torch.Generator().manual_seed(0)

    def jittery(x: Tensor, size: float) -> Tensor:
        def edit(g: Tensor) -> Tensor:
            return g * (1.0 + size * torch.rand(g.shape, generator=noise, dtype=g.dtype))

        return edited(x, edit).pow(2)

    x = draw(8, 4)
    assert not gradgradcheck(lambda x: jittery(x, 1e-9), x, raise_exception=False)
    assert gradgradcheck(lambda x: jittery(x, 1e-9), x, nondet_tol=1e-5)


def test_arguments_that_do_not_fit_are_explained() -> None:
    with pytest.raises(InputError, match="grad_outputs do not fit"):
        gradgradcheck(torch.sin, draw(6, 3), draw(7, 4))
    with pytest.raises(InputError, match="no gradient to differentiate"):
        gradgradcheck(lambda x: x.detach(), draw(6, 3))
    with pytest.raises(InputError, match="check_"):
        gradgradcheck(torch.sin, draw(6, 3), check_rev_over_rev=False)
