"""The gradient check on planted defects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.results import Verdict
from support.gradcheck_functions import F64, Edit, draw, edited, failure, kto, kto_inputs


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_flags_one_part_in_a_million_of_any_input(seed: int, wrong: int) -> None:
    def fn(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        edits = [edited(x, lambda g: g * (1.0 + 1e-6)) if k == wrong else x for k, x in enumerate(inputs)]
        return kto(*edits)

    result = failure(fn, kto_inputs(seed), seed=seed)
    assert result.worst_input == wrong
    assert [e.verdict is Verdict.FAIL for e in result.inputs] == [k == wrong for k in range(3)]
    assert result.evaluations <= 32


def elementwise(x: Tensor, edit: Edit) -> Tensor:
    return torch.sigmoid(edited(x, edit)).mul(torch.linspace(-1.0, 1.0, x.numel(), dtype=F64)).sum()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sign", lambda v: -v),
        ("zero", lambda v: 0.0 * v),
        ("tenth", lambda v: 1.1 * v),
        ("1e-5", lambda v: v * 1.00001),
    ],
)
def test_flags_and_finds_one_element_of_100000(name: str, change: Callable[[Tensor], Tensor]) -> None:
    place = 70_123

    def edit(g: Tensor) -> Tensor:
        g[place] = change(g[place])
        return g

    x = draw(3, 100_000)
    calls = []

    def fn(x: Tensor) -> Tensor:
        calls.append(None)
        return elementwise(x, edit)

    result = failure(fn, x, seed=1)
    assert result.evaluations <= 32
    assert len(calls) == result.evaluations + result.localise_evaluations
    assert result.localise_evaluations <= 64
    assert result.worst_index == (place,)
    (true,) = torch.autograd.grad(elementwise(x, lambda g: g), x)
    error = float(change(true[place]) - true[place])
    assert result.wrong_by == pytest.approx(error, rel=1e-2)
    # The defect is larger than the power that the check of the correct function states.
    assert gradcheck(lambda x: elementwise(x, lambda g: g), x, seed=1).inputs[0].element_power < abs(error)


def test_stated_power_is_what_flags() -> None:
    x = draw(4, 50)
    power = gradcheck(lambda x: elementwise(x, lambda g: g), x).inputs[0].relative_power
    assert power < 1e-7
    assert not gradcheck(lambda x: elementwise(x, lambda g: g * (1 + 2 * power)), x, raise_exception=False)
    assert gradcheck(lambda x: elementwise(x, lambda g: g * (1 + power / 100)), x).verdict is Verdict.PASS


def test_flags_missing_softmax_term() -> None:
    class OneHotOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.log_softmax(x, -1)[..., 2].sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            result = torch.zeros_like(x)
            result[..., 2] = grad
            return result

    failure(OneHotOnly.apply, draw(5, 4, 6))


def test_sees_what_torch_fast_mode_cannot() -> None:
    # Rows of (one-hot - softmax) sum to zero, so positive probes over many classes nearly cancel. The remaining
    # difference is smaller than torch's fixed tolerance. Here the gradient is twice the right one.
    def doubled(x: Tensor) -> Tensor:
        return 1e-3 * torch.log_softmax(edited(x, lambda g: 2.0 * g), -1)[..., 0].mean()

    x = draw(6, 4, 2000)
    torch.manual_seed(0)  # noqa: TID251  # torch draws its probes from the global generator
    assert torch.autograd.gradcheck(doubled, x, fast_mode=True)
    assert failure(doubled, x).worst_input == 0


def test_flags_error_orthogonal_to_ones() -> None:
    def edit(g: Tensor) -> Tensor:
        noise = torch.arange(g.numel(), dtype=F64).cos().view_as(g)
        return g + 1e-4 * (noise - noise.mean())

    failure(lambda x: (edited(x, edit) ** 2).sum(), draw(7, 30))


def test_flags_two_errors_that_cancel_under_plain_signs() -> None:
    def edit(g: Tensor) -> Tensor:
        g[0] += 1e-3
        g[1] += 1e-3
        g[2] -= 1e-3
        g[3] -= 1e-3
        return g

    for seed in range(20):
        failure(lambda x: elementwise(x, edit), draw(8, 40), seed=seed)


def test_flags_sign_flip_and_off_by_one_mask() -> None:
    failure(lambda *i: kto(i[0], edited(i[1], lambda g: -g), i[2]), kto_inputs(9))

    def shifted(g: Tensor) -> Tensor:
        keep = torch.arange(g.shape[1]) < 3
        return g * keep[:, None]

    x = draw(10, 2, 5, 3)
    mask = (torch.arange(5) < 4)[:, None]
    result = failure(lambda x: (edited(x, shifted).exp() * mask).sum(), x)
    assert result.worst_index is not None
    assert result.worst_index[1] == 3


def test_covers_every_output() -> None:
    # A loss of size 1 and a sum of size 1e6. The defect is in the loss.
    def fn(x: Tensor) -> tuple[Tensor, list[Tensor], str, Tensor]:
        return torch.sigmoid(edited(x, lambda g: g * (1 + 1e-4))).mean(), [1e6 * x.sin()], "ignored", x.long()

    failure(fn, draw(11, 12))
    assert gradcheck(lambda x: (torch.sigmoid(x).mean(), [1e6 * x.sin()], "ignored", x.long()), draw(11, 12))


def test_faint_input_keeps_its_power_beside_a_loud_one() -> None:
    loud, faint = draw(12, 10), draw(13, 10)
    fn = lambda a, b: (1e6 * a.sin()).sum() + 1e-2 * edited(b, lambda g: g * 1.01).exp().sum()  # noqa: E731
    assert failure(fn, (loud, faint)).worst_input == 1


def test_many_inputs_share_directions_and_say_so() -> None:
    inputs = [draw(20 + k, 3) for k in range(8)]
    good = gradcheck(lambda *xs: sum(x.exp().sum() for x in xs), inputs)
    assert good.verdict is Verdict.PASS
    assert not all(e.own_direction for e in good.inputs)
    assert good.evaluations <= 32
    bad = failure(
        lambda *xs: sum((edited(x, lambda g: g * 1.001) if k == 5 else x).exp().sum() for k, x in enumerate(xs)), inputs
    )
    assert bad.worst_input == 5


def test_missing_gradient() -> None:
    x, y = draw(14, 3), draw(15, 3)
    result = failure(lambda x, y: (x * y.detach()).sum(), (x, y))
    assert result.worst_input == 1
    assert "None" in result.reason
    unused = gradcheck(lambda x, y: x.exp().sum(), (x, y))
    assert unused.verdict is Verdict.PASS
    assert "zero" in unused.inputs[1].reason


def test_not_finite_and_not_differentiable() -> None:
    x = draw(16, 3)
    assert "output 0 is not finite" in failure(lambda x: torch.log(x - x), x).reason

    def edit(g: Tensor) -> Tensor:
        g[1] = torch.nan
        return g

    result = failure(lambda x: edited(x, edit).sum(), x)
    assert (result.worst_input, result.worst_index) == (0, (1,))
    assert "not differentiable" in failure(lambda x: x.detach().sum(), x).reason
    assert "no floating tensor" in failure(lambda x: 3, x).reason


def test_random_function_is_named() -> None:
    assert "not deterministic" in failure(lambda x: torch.nn.functional.dropout(x, 0.5), draw(17, 64)).reason
