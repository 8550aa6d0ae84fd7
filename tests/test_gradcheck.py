"""The gradient check on planted defects first, then on correct functions, noise, layouts and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.errors import GradcheckError, InputError
from ktonum.gradient_check.gradcheck import GradcheckResult, gradcheck
from ktonum.results import Verdict

F64 = torch.float64
Edit = Callable[[Tensor], Tensor]


class Edited(torch.autograd.Function):
    """The identity, with its gradient edited: every defect below is planted through this."""

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


# ---- planted defects


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
    # The power that the correct function's check states is no idle claim: this defect lies above it.
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
    # Rows of (one-hot - softmax) sum to zero, so positive probes over many classes see next to nothing of them; what is
    # left is smaller than the fixed tolerance. Here the gradient is twice what it should be.
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
    # A loss of size 1 beside a sum of size 1e6: the defect is in the small one.
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


# ---- correct functions


def correct(seed: int) -> Iterator[tuple[Callable[..., Any], Any]]:
    away = draw(seed, 12).detach()
    big = draw(seed + 1, 30).detach() * 1e7
    yield lambda *i: kto(*i), kto_inputs(seed)
    yield lambda a, b: a @ b, (draw(seed, 2, 3, scale=1e6), draw(seed + 1, 3, 2, scale=1e-6))
    yield lambda a: torch.softmax(a, -1), draw(seed, 2, 5, scale=3.0)
    yield lambda a: torch.logsumexp(a, -1), draw(seed, 3, 4, scale=1e-6)
    yield lambda a: torch.logsumexp(a, -1), draw(seed, 3, 4, scale=1e3)
    yield lambda a: torch.relu(a) + torch.relu(a) ** 2, (away + 0.3 * away.sign()).requires_grad_()
    yield lambda a: 1.0 + 1e-8 * a.sin(), draw(seed, 6)
    yield lambda a: (a + big).sum() - big.sum() + (a * a).sum(), draw(seed, 30)
    yield lambda a: torch.softmax(a, -1).sum(-1), draw(seed, 2, 4)
    yield lambda a: torch.log_softmax(a.float(), -1).double(), draw(seed, 2, 4)


@pytest.mark.parametrize("kind", range(10))
def test_no_false_alarm(kind: int) -> None:
    # 10 kinds of 100 seeds each: 1,000 checks, not one alarm. Float32 inside (the last) may drown a faint gradient.
    accepted = {Verdict.PASS, Verdict.INCONCLUSIVE} if kind == 9 else {Verdict.PASS}
    for seed in range(100):
        fn, inputs = list(correct(7 * seed))[kind]
        result = gradcheck(fn, inputs, seed=seed, raise_exception=False)
        assert result.verdict in accepted, result
        assert result.evaluations <= 32


def test_power_of_one_part_in_a_million_on_kto() -> None:
    for seed in range(50):
        result = gradcheck(lambda *i: kto(*i), kto_inputs(seed), seed=seed)
        assert max(e.relative_power for e in result.inputs) < 1e-6


@pytest.mark.parametrize("told", [None, "float32", torch.float32])
def test_float32_inside_is_never_a_false_alarm(told: Any) -> None:
    for seed in range(30):
        inputs = kto_inputs(seed)
        for cast in (lambda y: y, lambda y: y.double()):
            fn = lambda *i, cast=cast: cast(kto(*(x.float() for x in i))[1])  # noqa: E731
            result = gradcheck(fn, inputs, seed=seed, precision=told, raise_exception=False)
            assert result.verdict is not Verdict.FAIL, result
            assert min(e.relative_power for e in result.inputs) > 1e-8


def test_float32_inside_still_shows_a_real_defect() -> None:
    for told in (None, "float32"):
        failure(lambda x: torch.sigmoid(edited(x.float(), lambda g: 1.05 * g)).sum(), draw(18, 20), precision=told)


def test_float32_inputs_with_told_precision() -> None:
    x = draw(19, 20).detach().float().requires_grad_()
    assert gradcheck(lambda x: torch.sigmoid(x).sum(), x, precision="float32").verdict is Verdict.PASS
    failure(lambda x: torch.sigmoid(edited(x, lambda g: 1.05 * g)).sum(), x, precision="float32")


def test_hopeless_noise_is_inconclusive() -> None:
    result = gradcheck(lambda x: torch.sigmoid(x.bfloat16()).double(), draw(30, 20))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result
    assert "noise" in result.reason


def test_kink_at_the_point_is_inconclusive() -> None:
    x = torch.zeros(5, dtype=F64, requires_grad=True)
    result = gradcheck(lambda x: torch.relu(x).sum(), x)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "not smooth" in result.reason


def test_fast_oscillation_is_not_called_wrong() -> None:
    for seed in range(10):
        assert gradcheck(lambda x: 1.0 + 1e-3 * torch.sin(1e6 * x), draw(seed, 3), seed=seed)


def test_zero_gradient_is_true_only_when_it_is_true() -> None:
    assert gradcheck(lambda x: (x * 0.0 + 2.0).sum(), draw(31, 4)).verdict is Verdict.PASS
    failure(lambda x: edited(x, torch.zeros_like).exp().sum(), draw(31, 4))


# ---- budget, layouts, arguments


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
        (torch.ones(2, requires_grad=True), {}, "pass x.double"),
        (torch.ones(2, dtype=F64), {}, "requires_grad_"),
        ((1.0, "text"), {}, "requires_grad_"),
        (torch.ones(2, dtype=torch.complex128, requires_grad=True), {}, "only real inputs"),
        (torch.full((2,), torch.inf, dtype=F64, requires_grad=True), {}, r"not finite at \[0\]"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"precision": "float8"}, "accepted are None, float64"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"max_evaluations": 9}, "at least 10"),
        (torch.ones(2, dtype=F64, requires_grad=True), {"probes": 0}, "at least 10, 1 and 0"),
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
    good = gradcheck(lambda *i: kto(*i), kto_inputs(3)).to_check_result(case="c", check="gradcheck", names=names)
    assert (good.verdict, good.vacuous, good.failed) == (Verdict.PASS, False, False)
    assert [m.name for m in good.measurements] == [f"grad_{name}/finite_difference" for name in names]
    assert all(m.within for m in good.measurements)
    bad = failure(lambda *i: kto(i[0], edited(i[1], lambda g: 2 * g), i[2]), kto_inputs(3))
    record = bad.to_check_result(case="c", check="gradcheck", names=names)
    assert record.failed
    assert [m.within for m in record.measurements] == [True, False, True]
    assert record.worst is not None
    assert record.worst.name == "grad_weight/finite_difference"
