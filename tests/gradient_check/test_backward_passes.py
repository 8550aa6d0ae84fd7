"""A backward must give the same numbers each time, for every layout of cotangents and for each output alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.gradient_check.gradcheck import gradcheck
from support.gradcheck_functions import draw, edited, failure


def jittery(size: float, every: int) -> Callable[[Tensor], Tensor]:
    """``sin(x)``; each ``every``-th run of its backward has relative noise of ``size``, as atomics would make it."""
    noise, calls = torch.Generator().manual_seed(0), []

    def edit(g: Tensor) -> Tensor:
        calls.append(None)
        drawn = torch.randn(g.shape, generator=noise, dtype=g.dtype)
        return g * (1.0 + size * drawn) if len(calls) % every == 0 else g

    return lambda x: edited(x, edit).sin()


@pytest.mark.parametrize("every", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1e-2, 1e-9])
def test_noise_in_backward_is_called_not_reentrant(size: float, every: int) -> None:
    result = failure(jittery(size, every), draw(0, 50))
    assert "not reentrant" in result.reason
    assert result.worst_input == 0
    assert result.worst_index is None


def test_noise_is_not_blamed_on_an_element_in_an_audit() -> None:
    record = failure(jittery(1e-2, 1), draw(0, 50)).to_check_result(case="c", check="gradcheck")
    assert record.failed
    assert record.localisations == ()


def test_another_order_of_summation_is_no_defect() -> None:
    assert gradcheck(jittery(1e-15, 1), draw(0, 50))
    assert "not reentrant" in failure(jittery(1e-15, 1), draw(0, 50), nondet_tol=0.0).reason
    assert gradcheck(jittery(1e-15, 1), draw(0, 50), nondet_tol=1e-12)


def test_backward_that_runs_once_only() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.buffer = x.cos()
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            buffer, ctx.buffer = ctx.buffer, None
            return grad * buffer

    assert "not reentrant: its second run raised TypeError" in failure(Once.apply, draw(1, 3)).reason


def by_memory(g: Tensor) -> Tensor:
    """Read a cotangent as a kernel that takes every tensor for contiguous. Behind the end of a storage there is 0."""
    storage = g.untyped_storage().nbytes() // 8
    readable = min(g.numel(), storage - g.storage_offset())
    values = torch.zeros(g.numel(), dtype=g.dtype)
    values[:readable] = g.as_strided((readable,), (1,))
    return values.nan_to_num().view(g.shape)


class Reader(torch.autograd.Function):
    """The identity, whose backward reads the cotangent by ``read``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.read = read
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.read(grad), None


def test_cotangents_that_are_not_contiguous() -> None:
    reason = failure(lambda x: Reader.apply(x.sin(), by_memory), draw(2, 4, 3)).reason
    assert "not contiguous" in reason
    assert "strides" in reason

    def refuses(g: Tensor) -> Tensor:
        if not g.is_contiguous():
            raise RuntimeError("contiguous only")
        return g.clone()

    assert "raised RuntimeError" in failure(lambda x: Reader.apply(x.sin(), refuses), draw(2, 4, 3)).reason


def test_expanded_cotangents() -> None:
    def expanded_only(g: Tensor) -> Tensor:
        return by_memory(g) if 0 in g.stride() else g.clone()

    assert "expanded" in failure(lambda x: Reader.apply(x.sin(), expanded_only), draw(3, 4, 3)).reason


def test_outputs_whose_gradients_need_each_other() -> None:
    class SumAndMean(torch.autograd.Function):
        """Backward gives nothing for the mean where the sum has no gradient, as torch's native_group_norm."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            ctx.size = x.shape
            return x.sum(), x.mean()

        @staticmethod
        def backward(ctx: Any, of_sum: Any, of_mean: Any) -> Any:
            if of_sum is None:
                return torch.zeros(ctx.size, dtype=torch.float64)
            return (of_sum + (0.0 if of_mean is None else of_mean / ctx.size[0])).expand(ctx.size)

    result = failure(SumAndMean.apply, draw(4, 5))
    assert "each output alone" in result.reason
    assert result.worst_input == 0
    assert gradcheck(lambda x: (x.sum(), x.mean()), draw(4, 5))


def test_native_group_norm_of_torch() -> None:
    weight, bias = draw(6, 4), draw(7, 4)
    reason = failure(
        lambda x, w, b: torch.native_group_norm(x, w, b, 2, 4, 3, 2, 1e-5), (draw(5, 2, 4, 3), weight, bias)
    )
    assert "each output alone" in reason.reason
