"""Values that look like float32 do not loosen the check; computing in float32 does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.results import Verdict
from support.gradcheck_functions import Edit, edited, failure

#: Sixty picks from forty numbers: some twice, some never.
INDEX = torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(40, generator=torch.Generator().manual_seed(2)).double()


def narrow(seed: int, n: int = 40) -> Tensor:
    """Float64 numbers that were drawn in float32, away from 0."""
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return (drawn + 0.1 * drawn.sign()).double().requires_grad_()


# What only passes float32 values on: its outputs are float32 values where its inputs are.
PASSING: dict[str, Callable[[Tensor, Edit], Tensor]] = {
    "relu": lambda x, edit: torch.relu(edited(x, edit)),
    "gather": lambda x, edit: edited(x, edit)[INDEX],
    "copy": lambda x, edit: edited(x, edit).clone(),
    "maximum": lambda x, edit: torch.maximum(edited(x, edit), OTHER),
}


@pytest.mark.parametrize("name", PASSING)
def test_values_that_look_like_float32_are_checked_in_float64(name: str) -> None:
    fn = PASSING[name]
    for seed in range(20):
        x = narrow(seed)
        right = gradcheck(lambda x: fn(x, lambda g: g), x, seed=seed)
        assert right.precision == "float64"
        assert right.inputs[0].relative_power < 1e-9
        failure(lambda x: fn(x, lambda g: g * (1.0 + 1e-6)), x, seed=seed)


def test_relu_with_a_leak_in_backward() -> None:
    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return grad * torch.where(x > 0, 1.0, 0.01)

    for seed in range(20):
        failure(Leaky.apply, narrow(seed), seed=seed)


def test_repeated_index_that_assigns() -> None:
    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x[INDEX]

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            g = torch.zeros(40, dtype=grad.dtype)
            g[INDEX] = grad
            return g

    for seed in range(20):
        failure(Gather.apply, narrow(seed), seed=seed)


@pytest.mark.parametrize("wide", [False, True])
def test_computing_in_float32_is_tolerated(wide: bool) -> None:
    for seed in range(10):
        x = narrow(seed).detach() * (4.0 / 3.0 if wide else 1.0)
        result = gradcheck(lambda x: torch.sigmoid(x.float()).double(), x.requires_grad_(), seed=seed)
        assert result.verdict is Verdict.PASS
        assert result.precision == "float32 (seen in the outputs)"


def test_computing_in_float32_is_tolerated_beside_an_infinity() -> None:
    x = narrow(0).detach()
    x[3] = torch.inf
    assert gradcheck(lambda x: torch.sigmoid(x.float()).double(), x.requires_grad_())
    assert gradcheck(torch.relu, x).precision == "float64"
