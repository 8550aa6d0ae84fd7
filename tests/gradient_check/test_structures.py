"""Nested, complex and sparse inputs and outputs, and modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ktonum.errors import InputError
from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.results import Verdict
from support.gradcheck_functions import F64, draw, edited, failure


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


def doubled(x: Tensor) -> Tensor:
    return edited(x, lambda g: 2.0 * g)


def test_dict_inside_a_tuple() -> None:
    state = {"x": draw(0, 3), "flags": [True, draw(1, 3)], "name": "text"}

    def fn(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda s, k: {"y": (s["x"] * edit(s["flags"][1])).exp() * k, "kind": s["name"], "flag": s["flags"][0]}

    result = gradcheck(fn(lambda x: x), (state, 2))
    assert [entry.name for entry in result.inputs] == ["input 0['x']", "input 0['flags'][1]"]
    assert "input 0['flags'][1] is wrong" in failure(fn(doubled), (state, 2)).reason


def test_named_tuples_keep_their_names() -> None:
    def right(pair: Pair) -> Pair:
        return Pair(pair.x * pair.scale, pair.scale.sum())

    assert gradcheck(right, (Pair(draw(2, 3), draw(3, 3)),))
    assert failure(lambda p: right(Pair(p.x, doubled(p.scale))), (Pair(draw(2, 3), draw(3, 3)),)).worst_input == 1


def complex_numbers(seed: int, *shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.exp(),
        lambda z: z.abs(),
        lambda z: z.conj() * z,
        lambda z: torch.view_as_real(z).sin(),
        lambda z: z.imag,
        lambda z: (z @ z.mH, z.imag.sum()),
    ],
)
def test_complex_functions_pass_and_a_missing_conjugate_fails(fn: Callable[[Tensor], Any]) -> None:
    z = complex_numbers(4, 3, 2)
    assert gradcheck(fn, z)
    failure(lambda z: fn(edited(z, lambda g: g.conj())), z)


def test_complex_outputs_of_real_inputs() -> None:
    assert gradcheck(lambda x: torch.fft.rfft(x), draw(5, 8))
    failure(lambda x: torch.fft.rfft(doubled(x)), draw(5, 8))


def test_a_wrong_imaginary_part_is_found() -> None:
    def edit(g: Tensor) -> Tensor:
        g[1] += 0.5j
        return g

    result = failure(lambda z: edited(z, edit).exp(), complex_numbers(6, 3))
    assert "element [1], imaginary part" in result.reason


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_inputs(layout: torch.layout) -> None:
    dense = torch.tensor([[0.0, 1.5, 0.0], [-0.7, 0.0, 2.0]], dtype=F64)
    x = dense.to_sparse(layout=layout).requires_grad_()
    y = draw(7, 3, 2)
    for masked in (False, True):
        options = {"masked": masked}
        assert gradcheck(lambda x, y, m=masked: x.to_dense(masked_grad=m).sin() @ y, (x, y), **options)
        assert failure(lambda x, y: x.to_dense(masked_grad=False) @ doubled(y), (x, y), **options).worst_input == 1
        assert failure(lambda x, y: doubled(x.to_dense(masked_grad=False)) @ y, (x, y), **options).worst_input == 0
    assert gradcheck(lambda x, y: (x @ y).sin(), (x, y), masked=True)


def test_functions_of_the_specified_elements() -> None:
    x = torch.eye(3, dtype=F64).to_sparse().requires_grad_()

    def mean(x: Tensor) -> Tensor:
        values = x.coalesce().values()
        return values.exp().sum() / values.numel()

    assert gradcheck(mean, x, masked=True)
    assert "depends on which elements are specified" in failure(mean, x).reason


@pytest.mark.parametrize("layout", [torch.sparse_bsr, torch.sparse_bsc])
@pytest.mark.parametrize("masked", [False, True])
def test_inputs_of_sparse_blocks(layout: torch.layout, masked: bool) -> None:
    x = torch.eye(4, dtype=F64).mul(1.5).to_sparse(layout=layout, blocksize=(2, 2)).requires_grad_()
    assert gradcheck(lambda x: x.to_dense(masked_grad=masked).sin(), x, masked=masked)
    failure(lambda x: doubled(x.to_dense(masked_grad=masked)).sin(), x, masked=masked)


def test_other_layouts_are_refused_with_a_way_out() -> None:
    x = torch.ones(4).to_mkldnn().requires_grad_()
    with pytest.raises(InputError, match="accepted are strided"):
        gradcheck(lambda x: x.to_dense(), x)


def test_sparse_outputs_are_refused_with_a_way_out() -> None:
    with pytest.raises(InputError, match="to_dense"):
        gradcheck(lambda x: x * 2.0, torch.eye(2, dtype=F64).to_sparse().requires_grad_())


class Scaled(torch.nn.Module):
    def __init__(self, edit: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(draw(8, 3).detach())
        self.bias = torch.nn.Parameter(draw(9, 3).detach())
        self.register_buffer("calls", torch.zeros((), dtype=F64))
        self.edit = edit

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x * self.edit(self.weight) + self.bias).tanh()


def test_parameters_of_a_module_are_checked() -> None:
    module = Scaled()
    before = [p.detach().clone() for p in module.parameters()]
    result = gradcheck(module, draw(10, 2, 3))
    assert [e.name for e in result.inputs] == ["input 0", "parameter weight", "parameter bias"]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert module.calls == 0
    result = failure(Scaled(doubled), draw(10, 2, 3))
    assert "the gradient of parameter weight is wrong" in result.reason
    assert "2 times the right one" in result.reason


def test_tensors_that_were_not_passed_are_named() -> None:
    module = Scaled(doubled)
    result = gradcheck(lambda x: module(x), draw(10, 2, 3))
    assert result.verdict is Verdict.PASS
    assert "Not checked: 2 other tensors" in result.reason
    assert "the module itself" in result.reason


def test_outputs_without_gradient_are_ignored() -> None:
    def fn(x: Tensor) -> tuple[Any, ...]:
        return x.exp(), x.detach() * 3.0, x.argmax(), None, "text"

    assert gradcheck(fn, draw(11, 4))
    failure(lambda x: fn(doubled(x)), draw(11, 4))


def test_values_that_are_no_tensors_reach_the_function() -> None:
    seen = []

    def fn(x: Tensor, power: int, options: dict[str, str], nothing: None) -> Tensor:
        seen.append((power, options["mode"], nothing))
        return x**power

    assert gradcheck(fn, (draw(12, 4), 3, {"mode": "fast"}, None))
    assert set(seen) == {(3, "fast", None)}


def test_functions_that_need_gradients_recorded() -> None:
    def hooked(x: Tensor, factor: float) -> Tensor:
        y = x.clone()
        y.register_hook(lambda g: None if g is None else factor * g)
        return y.sin()

    def force(x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        return edit(gradient)

    assert gradcheck(lambda x: hooked(x, 1.0), draw(14, 3))
    failure(lambda x: hooked(x, 2.0), draw(14, 3))
    assert gradcheck(lambda x: force(x, lambda y: y), draw(14, 3))
    failure(lambda x: force(x, doubled), draw(14, 3))


def test_an_output_that_is_the_input_itself() -> None:
    assert gradcheck(lambda x: x, draw(13, 3))
    assert gradcheck(lambda x: (x, x[0], x.view(-1)), draw(13, 3))
