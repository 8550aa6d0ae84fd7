"""Bounds of a case: what an error model returns, what stands in for one, what a standard adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import ktonum
from ktonum.auditing.judge import check_named, run_check
from ktonum.bounds import EAGER
from ktonum.case.context import CaseContext
from ktonum.case.granted_bounds import granted_bounds
from ktonum.declare.cases import Case
from ktonum.declare.error_model import ErrorModel
from ktonum.declare.op import Op
from ktonum.errors import KtonumError
from ktonum.results import Verdict
from subjects.small_ops import RMS_NORM


def _op(returned: Any) -> Op:
    """RMSNorm, whose error model returns the same for every tensor."""

    def model(*arguments: Any) -> Mapping[str, Any]:
        return dict.fromkeys(("y", "grad_x", "grad_weight"), returned)

    typed: ErrorModel = model
    return replace(RMS_NORM, error_model=typed)


def _case(op: Op, dtype: str) -> Case:
    (case,) = op.cases(profile="quick", dtypes=[dtype], device="cpu")
    return case


_NUMBER = torch.tensor(0.25)


@pytest.mark.parametrize(
    ("returned", "words"),
    [((_NUMBER, _NUMBER), "a tuple of 2"), ((_NUMBER, _NUMBER, 0.5), "a tuple of 3"), (_NUMBER, "a Tensor")],
    ids=["pair", "triple", "tensor"],
)
def test_an_error_model_that_returns_something_else_is_an_error_of_the_audit(returned: Any, words: str) -> None:
    op = _op(returned)
    case = _case(op, "fp32")
    message = f"error model of op 'rms_norm' returned {words} for 'y': return ktonum.DerivedErrors"
    with pytest.raises(KtonumError, match=message):
        CaseContext(op, case).bounds("precise")
    result = run_check(check_named(op, case, "forward"), CaseContext(op, case))
    assert result.verdict is Verdict.ERROR and result.failed and words in result.reason


def test_a_bound_has_the_errors_of_the_model_and_its_bias() -> None:
    op = _op(ktonum.DerivedErrors(_NUMBER, 2 * _NUMBER, bias=-0.125))
    bound = CaseContext(op, _case(op, "fp32")).bounds("precise")["y"]
    assert (float(bound.independent), float(bound.coherent), bound.bias) == (0.25, 0.5, -0.125)
    assert ktonum.DerivedErrors(_NUMBER, _NUMBER).bias == 0.0


def test_twice_the_bias_of_plain_pytorch_is_granted_beside_that_of_the_model() -> None:
    op = replace(_op(ktonum.DerivedErrors(_NUMBER, _NUMBER, bias=-0.125)), reference=_too_long_in_16_bits)
    for dtype, granted in (("bf16", 0.125 + 2 / 64), ("fp32", -0.125)):
        context = CaseContext(op, _case(op, dtype))
        assert context.bounds("precise")["y"].bias == -0.125
        assert context.bounds("eager")["y"].bias == pytest.approx(granted, rel=0.05)


def _too_long_in_16_bits(**inputs: Any) -> dict[str, torch.Tensor]:
    y = RMS_NORM.reference(**inputs)["y"]
    return {"y": y * (1 + 1 / 64) if y.element_size() == 2 else y}


def test_what_is_plain_pytorchs_error_is_granted_at_extremes_under_eager_alone() -> None:
    op = replace(_op(ktonum.DerivedErrors(0 * _NUMBER, 0 * _NUMBER)), reference=_too_long_in_16_bits)
    context = CaseContext(op, _case(op, "bf16"))
    expected = context.oracle.tensors()["y"]
    assert not bool(context.bound_at_extremes("y", "precise").independent.any())
    granted = context.bound_at_extremes("y", "eager").independent
    assert bool((granted >= 4 * (context.plain.tensors()["y"].double() - expected).abs()).all())
    assert not bool(context.bounds("eager")["y"].independent.any())


def test_bounds_are_derived_once_and_without_a_reference_of_the_context_to_itself() -> None:
    """A case of production size fills half a GPU, and must go when its last holder lets go of it."""
    import weakref

    context = CaseContext(replace(RMS_NORM, error_model=None), _case(RMS_NORM, "bf16"))
    assert context.bounds("eager") is context.bounds("eager")
    assert granted_bounds(context, EAGER).keys() == context.bounds("eager").keys()
    held = weakref.ref(context)
    del context
    assert held() is None
