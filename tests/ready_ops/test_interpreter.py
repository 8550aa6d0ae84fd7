"""Kernels of other projects in Triton's interpreter: they run there, and results are refused where it is wrong."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ktonum.auditing.in_process import audit
from ktonum.case.interpreter_trust import refusing_bfloat16_of_the_interpreter
from ktonum.declare.op import Op, load_object
from ktonum.errors import UsageError
from ktonum.ready_ops.interpreted_kernels import make_interpretable
from ktonum.results import CheckResult, Verdict

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    module = importlib.import_module("support.interpreted_kernels")
    make_interpretable(module)
    return module


def values(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-3, 3, 64).to(dtype)


@pytest.mark.parametrize(
    ("name", "operation"), [("doubled", "arithmetic"), ("summed", "reductions"), ("rounded_inside", "casts")]
)
def test_a_kernel_that_calculates_in_bfloat16_is_refused(kernels: ModuleType, name: str, operation: str) -> None:
    function: Callable[[Tensor], Tensor] = getattr(kernels, name)
    with pytest.raises(UsageError, match=f"calculate in bfloat16 .*{operation}.*audit it on a GPU"):
        with refusing_bfloat16_of_the_interpreter():
            function(values(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["doubled", "summed", "doubled_wide"])
def test_other_dtypes_are_believed(kernels: ModuleType, name: str, dtype: torch.dtype) -> None:
    x = values(dtype)
    with refusing_bfloat16_of_the_interpreter():
        actual = getattr(kernels, name)(x)
    expected = x.sum() if name == "summed" else 2 * x
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_a_kernel_that_upcasts_and_rounds_outside_is_believed(kernels: ModuleType) -> None:
    x = values(torch.bfloat16)
    with refusing_bfloat16_of_the_interpreter():
        actual = kernels.doubled_wide(x)
    assert torch.equal(actual, 2 * x)


def test_an_error_within_is_raised_where_no_bfloat16_explains_it(kernels: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError), refusing_bfloat16_of_the_interpreter():
        kernels.doubled(values(torch.float32))
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="bfloat16") as caught, refusing_bfloat16_of_the_interpreter():
        kernels.doubled(values(torch.bfloat16))
        raise ZeroDivisionError
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_afterwards_the_interpreter_is_as_it_was(kernels: ModuleType) -> None:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    before = dict(vars(interpreter.InterpreterBuilder)), interpreter._implicit_cvt
    kernels.scaled(values(torch.float32), 0.5)
    with refusing_bfloat16_of_the_interpreter():
        kernels.doubled(values(torch.float32))
    assert (dict(vars(interpreter.InterpreterBuilder)), interpreter._implicit_cvt) == before


def test_float_scalars_and_libdevice(kernels: ModuleType) -> None:
    x = values(torch.float32)
    torch.testing.assert_close(kernels.scaled(x, 0.3), x.tanh() * 0.3)


def test_an_autotuner_takes_its_first_configuration(kernels: ModuleType) -> None:
    x = values(torch.float32)
    assert torch.equal(kernels.stepped(x), x + 1)


def test_making_interpretable_twice_changes_nothing(kernels: ModuleType) -> None:
    before = dict(vars(kernels))
    make_interpretable(kernels)
    assert dict(vars(kernels)) == before


def test_compiled_kernels_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("support.interpreted_kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    before = dict(vars(module))
    make_interpretable(module)
    assert dict(vars(module)) == before


#: Dims of about one tile. In the interpreter, a long reduction takes as long as all other checks together.
SMALL = {
    "rms_norm": {"N": 3, "H": 20},
    "layer_norm": {"N": 3, "H": 20},
    "swiglu": {"N": 3, "H": 20},
    "cross_entropy": {"N": 9, "V": 19},
    "fused_linear_cross_entropy": {"N": 5, "H": 12, "V": 19},
}
LIGER = pytest.mark.parametrize(
    ("name", "small"),
    [
        pytest.param(name, small, id=f"{name}-{'small' if small else 'quick'}", marks=marks)
        for name in SMALL
        for small, marks in ((True, ()), (False, (pytest.mark.exhaustive,)))
    ],
)


def _results(name: str, dtype: str, *, small: bool) -> list[CheckResult]:
    """The results of all checks of the quick profile, or of all but `growth` at one small point."""
    op: Op = load_object(f"ktonum.ready_ops.{name}:OP").with_candidate("liger")
    if small:
        first = op.points("quick")[0]
        op = replace(op, dims=[replace(first, dims=SMALL[name], checks=(), without=(*first.without, "growth"))])
    return list(audit(op, device="cpu", dtypes=dtype, standard="eager").results)


@LIGER
def test_liger_kernels_run_in_float32_and_what_they_overwrite_is_flagged(name: str, small: bool) -> None:
    pytest.importorskip("liger_kernel")
    # Gradients overwrite the upstream gradient, the inputs or the logits; see docs/findings.md.
    known = {
        "rms_norm": {"unmodified"},
        "swiglu": {"unmodified", "graph"},
        "cross_entropy": {"unmodified", "strided", "graph"},
        "fused_linear_cross_entropy": {"gradient_subsets", "graph", "autocast"},
    }
    failing = {r.check for r in _results(name, "fp32", small=small) if r.verdict is not Verdict.PASS}
    assert failing == known.get(name, set())


@LIGER
def test_their_bfloat16_is_inconclusive_and_never_fails(name: str, small: bool) -> None:
    pytest.importorskip("liger_kernel")
    results = _results(name, "bf16", small=small)
    assert len(results) > 10 and {r.verdict for r in results} == {Verdict.INCONCLUSIVE}
    assert all("calculate in bfloat16" in r.reason for r in results)


def test_a_candidate_of_no_such_name_is_refused() -> None:
    with pytest.raises(UsageError, match="has no 'dropout'"):
        load_object("ktonum.ready_ops.liger_candidates:dropout")
