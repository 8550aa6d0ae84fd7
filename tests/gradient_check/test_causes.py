"""Usual mistakes are named, and others are not given a false name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.gradcheck_functions import Edit, draw, edited, failure


def elementwise(x: Tensor, edit: Edit) -> Tensor:
    return torch.sigmoid(edited(x, edit)) * torch.linspace(-1.0, 1.0, x.numel(), dtype=torch.float64)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda g: 2.0 * g, "2 times the right one"),
        (lambda g: g / 8.0, "0.125 times the right one"),
        (lambda g: -g, "-1 times the right one"),
        (lambda g: g + 0.25, "off by the same 0.25"),
        (lambda g: torch.zeros_like(g), "as if the path to the output were detached"),
    ],
)
def test_usual_mistakes_are_named(edit: Edit, words: str) -> None:
    for seed in range(3):
        assert words in failure(lambda x: elementwise(x, edit), draw(seed, 30), seed=seed).reason


def test_a_single_number_gets_no_cause() -> None:
    """Whatever its gradient is, it is some factor times the right one."""
    reason = failure(lambda x, s: x * edited(s, lambda g: g + 0.3 * g.sign()).exp(), (draw(3, 5), draw(4))).reason
    assert "input 1 is wrong: the only element is off by" in reason
    assert "times the right one" not in reason
    assert "off by the same" not in reason


def test_missing_conjugate() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, generator=generator, dtype=torch.complex128).requires_grad_()
    c = torch.randn(5, generator=generator, dtype=torch.complex128)

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return (c * x).real.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * c

    reason = failure(Times.apply, x).reason
    assert "conj" in reason


def test_repeated_index() -> None:
    index = torch.tensor([0, 3, 3, 5, 1])

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x[index]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            g = torch.zeros(6, dtype=grad.dtype)
            g[index] = grad
            return g

    for seed in range(3):
        result = failure(Gather.apply, draw(1, 6), seed=seed)
        assert result.worst_index == (3,)
        assert "where an index repeats, backward must add" in result.reason


def test_a_wrong_region_gets_no_false_cause() -> None:
    """Backward of a relu that leaks below 0: neither a factor nor a constant explains it."""

    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.where(ctx.saved_tensors[0] > 0, 1.0, 0.1)

    x = draw(2, 40).detach()
    x = (x + 0.1 * x.sign()).requires_grad_()
    for seed in range(5):
        reason = failure(Leaky.apply, x, seed=seed).reason
        assert not any(words in reason for words in ("times the right one", "off by the same", "detached", "repeats"))
