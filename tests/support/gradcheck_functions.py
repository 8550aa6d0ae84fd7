"""Functions whose gradients are checked, and the edits that make the gradients wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.gradient_check.gradcheck import GradcheckResult, gradcheck
from ktonum.gradient_check.gradcheck_error import GradcheckError
from ktonum.results import Verdict

F64 = torch.float64
Edit = Callable[[Tensor], Tensor]


class Edited(torch.autograd.Function):
    """The identity, except that its gradient is edited. Every defect below uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, edit: Edit) -> Tensor:
        ctx.edit = edit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.edit(grad.clone()), None


def edited(x: Tensor, edit: Edit) -> Tensor:
    result: Tensor = Edited.apply(x, edit)
    return result


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=F64) * scale).requires_grad_()


def kto(x: Tensor, weight: Tensor, bias: Tensor, reference: float = -9.0) -> tuple[Tensor, Tensor]:
    """A small KTO loss for desirable completions, and the log-probabilities of its sequences."""
    logits = torch.log_softmax(x @ weight.T + bias, -1)
    target = torch.arange(x.shape[1]).remainder(weight.shape[0]).expand(x.shape[0], -1)
    chosen = logits.gather(-1, target[..., None])[..., 0].sum(-1)
    return (1.0 - torch.sigmoid(0.1 * (chosen - reference))).mean(), chosen


def kto_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(seed, 3, 5, 4), draw(seed + 1, 7, 4, scale=0.5), draw(seed + 2, 7, scale=1e-3)


def failure(fn: Callable[..., Any], inputs: Any, **options: Any) -> GradcheckResult:
    with pytest.raises(GradcheckError) as caught:
        gradcheck(fn, inputs, **options)
    result = caught.value.result
    assert isinstance(result, GradcheckResult)
    assert result.verdict is Verdict.FAIL
    assert not result
    assert str(result) == str(caught.value)
    return result
