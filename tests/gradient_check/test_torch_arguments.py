"""Every argument of torch's gradcheck is there and does what torch's documentation says it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError

import ktonum
from ktonum.errors import InputError
from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.gradient_check.recorded_call import RecordedCall
from ktonum.results import Verdict
from support.gradcheck_functions import F64, draw, edited, failure


@pytest.mark.parametrize("name", ["gradcheck", "gradgradcheck"])
def test_no_argument_of_torch_is_missing(name: str) -> None:
    theirs = inspect.signature(getattr(torch.autograd, name)).parameters
    ours = inspect.signature(getattr(ktonum, name)).parameters
    assert set(theirs) <= set(ours)
    positional = [p.name for p in theirs.values() if p.default is inspect.Parameter.empty]
    assert [p.name for p in ours.values() if p.default is inspect.Parameter.empty] == positional
    # Arguments that torch takes by position are taken by position here.
    by_place = [p.name for p in theirs.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == by_place
    # Those whose default differs are documented in docs/gradcheck.md.
    different = {n for n, p in theirs.items() if p.default is not ours[n].default and p.default != ours[n].default}
    assert different <= {"eps", "atol", "rtol", "nondet_tol", "fast_mode"}


@pytest.mark.parametrize("options", [{"eps": 1e-3}, {"atol": 1.0}, {"rtol": 1.0}, {"fast_mode": True}])
def test_tolerances_and_steps_are_accepted_without_effect(options: dict[str, Any]) -> None:
    assert gradcheck(torch.sin, draw(0, 3), **options) == gradcheck(torch.sin, draw(0, 3))
    failure(lambda x: edited(x, lambda g: g * 1.0001).sin(), draw(0, 3), **options)


def test_raise_exception() -> None:
    def wrong(x: Tensor) -> Tensor:
        return edited(x, lambda g: 2.0 * g).sin()

    with pytest.raises(TorchGradcheckError, match="FAIL") as caught:
        gradcheck(wrong, draw(0, 3))
    assert isinstance(caught.value, ktonum.GradcheckError)
    assert isinstance(caught.value, ktonum.KtonumError)
    result = gradcheck(wrong, draw(0, 3), raise_exception=False)
    assert result.verdict is Verdict.FAIL
    assert not result


def test_inconclusive_raises_and_is_falsy() -> None:
    x = torch.zeros(3, dtype=F64, requires_grad=True)
    with pytest.raises(TorchGradcheckError, match="INCONCLUSIVE"):
        gradcheck(torch.relu, x)
    result = gradcheck(torch.relu, x, raise_exception=False)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert not result


class Custom(torch.autograd.Function):
    """``sin(x)`` with a backward and a jvp that a test chooses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, backward: Callable[..., Any], jvp: Callable[..., Any]) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.chosen_backward, ctx.chosen_jvp = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return ctx.chosen_backward(ctx.saved_tensors[0], grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return ctx.chosen_jvp(ctx.saved_tensors[0], tangent)


def right_backward(x: Tensor, grad: Any) -> Any:
    return None if grad is None else grad * x.cos()


def right_jvp(x: Tensor, tangent: Tensor) -> Tensor:
    return tangent * x.cos()


def custom(backward: Callable[..., Any] = right_backward, jvp: Callable[..., Any] = right_jvp) -> Callable[..., Any]:
    return lambda x: Custom.apply(x, backward, jvp)


EVERYTHING = {
    "check_undefined_grad": True,
    "check_grad_dtypes": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
    "check_forward_ad": True,
    "nondet_tol": 0.0,
}


@pytest.mark.parametrize("fn", [custom(), torch.sin, lambda x: (x @ x.T, x.sum())])
def test_right_functions_pass_with_every_check_on(fn: Callable[..., Any]) -> None:
    assert gradcheck(fn, draw(1, 4, 3), **EVERYTHING)


def test_check_undefined_grad() -> None:
    fn = custom(backward=lambda x, grad: grad * x.cos())  # raises a TypeError for None
    reason = failure(fn, draw(1, 3)).reason
    assert "undefined (None)" in reason
    assert "check_undefined_grad=False" in reason
    assert gradcheck(fn, draw(1, 3), check_undefined_grad=False)
    reason = failure(custom(backward=lambda x, g: x.cos() if g is None else g * x.cos()), draw(1, 3)).reason
    assert "not zero" in reason


def test_check_undefined_grad_of_each_output() -> None:
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            return 2.0 * x, 3.0 * x

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None and grads[1] is None:
                return None
            return 2.0 * grads[0] + 3.0 * grads[1]

    assert "raised TypeError" in gradcheck(Two.apply, draw(1, 3), raise_exception=False).reason


def test_check_grad_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RecordedCall.raw_gradients

    def wider(self: RecordedCall, *arguments: Any) -> list[Tensor | None]:
        return [None if g is None else g.double() for g in right(self, *arguments)]

    # torch's engine casts the gradients of every function that can be written in Python.
    monkeypatch.setattr(RecordedCall, "raw_gradients", wider)
    x = draw(1, 3).detach().float().requires_grad_()
    assert gradcheck(torch.sin, x)
    assert "the gradient of input 0 has the dtype torch.float64" in failure(torch.sin, x, check_grad_dtypes=True).reason
    assert gradcheck(torch.sin, draw(1, 3), check_grad_dtypes=True)


def test_check_batched_grad() -> None:
    def wrong_under_vmap(x: Tensor, grad: Tensor) -> Tensor:
        depth = torch._C._vmapmode_increment_nesting()
        torch._C._vmapmode_decrement_nesting()
        return grad * x.cos() * (2.0 if depth > 1 else 1.0)

    def raises_under_vmap(x: Tensor, grad: Tensor) -> Tensor:
        return torch.zeros_like(x).copy_(grad * x.cos())

    for backward, words in ((wrong_under_vmap, "another gradient"), (raises_under_vmap, "raised")):
        fn = custom(backward=backward)
        assert gradcheck(fn, draw(1, 3), check_undefined_grad=False)
        reason = failure(fn, draw(1, 3), check_batched_grad=True, check_undefined_grad=False).reason
        assert "vmap" in reason
        assert words in reason


def test_check_forward_ad() -> None:
    fn = custom(jvp=lambda x, tangent: tangent * x.cos() * 1.001)
    assert gradcheck(fn, draw(1, 3))
    result = failure(fn, draw(1, 3), check_forward_ad=True)
    assert "forward-mode" in result.reason
    assert result.worst_input == 0
    failure(custom(backward=lambda x, g: 1.001 * g * x.cos()), draw(1, 3), check_forward_ad=True)


def test_check_forward_ad_alone() -> None:
    only = {"check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(custom(backward=lambda x, grad: 7.0 * grad), draw(1, 3), **only)
    assert failure(custom(jvp=lambda x, tangent: 1.001 * tangent * x.cos()), draw(1, 3), **only).inputs


def test_check_batched_forward_grad() -> None:
    def wrong_under_vmap(x: Tensor, tangent: Tensor) -> Tensor:
        inner, batched = tangent, False
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            batched |= torch._C._functorch.is_batchedtensor(inner)
            inner = torch._C._functorch.get_unwrapped(inner)
        return tangent * x.cos() * (2.0 if batched else 1.0)

    fn = custom(jvp=wrong_under_vmap)
    assert gradcheck(fn, draw(1, 3), check_forward_ad=True)
    reason = failure(fn, draw(1, 3), check_forward_ad=True, check_batched_forward_grad=True).reason
    assert "vmap" in reason


@pytest.mark.parametrize(
    "options",
    [
        {"check_backward_ad": False},
        {"check_backward_ad": False, "check_forward_ad": True, "check_batched_grad": True},
        {"check_batched_forward_grad": True},
    ],
)
def test_contradicting_arguments_are_refused(options: dict[str, bool]) -> None:
    with pytest.raises(InputError, match="check_"):
        gradcheck(torch.sin, draw(1, 3), **options)


def test_nondet_tol() -> None:
    class Jittery(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            Jittery.calls += 1
            return grad * ctx.saved_tensors[0].cos() * (1.0 + 1e-9 * (Jittery.calls % 2))

    for tolerance in (None, 0.0, 1e-12):
        assert "reentrant" in failure(Jittery.apply, draw(1, 3), nondet_tol=tolerance).reason
    assert gradcheck(Jittery.apply, draw(1, 3), nondet_tol=1e-7)
    # The jitter that shows decides about the power, not the tolerance.
    for tolerance in (1e-7, 1e-2):
        result = failure(
            lambda x: edited(Jittery.apply(x), lambda g: (1.0 + 1e-7) * g), draw(1, 3), nondet_tol=tolerance
        )
        assert result.inputs[0].relative_power > 1e-9


@pytest.mark.parametrize("masked", [None, True, False])
def test_masked(masked: bool | None) -> None:
    dense = torch.tensor([[1.5, 0.0], [0.0, -0.5]], dtype=F64)
    x = dense.to_sparse().requires_grad_()

    def by_specified(x: Tensor) -> Tensor:
        return x.to_dense(masked_grad=True).sin()

    # None is False, as in torch.
    assert gradcheck(lambda x: x.to_dense(masked_grad=False).sin(), x, masked=masked)
    # The masked gradient lacks the elements that are not specified.
    theirs = torch.autograd.gradcheck(by_specified, x, masked=masked, raise_exception=False)
    assert bool(gradcheck(by_specified, x, masked=masked, raise_exception=False)) == theirs == bool(masked)
