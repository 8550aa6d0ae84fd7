"""The check `nonfinite` with a poisoned element that is ignored: the reference says what must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.auditing.judge import run_check
from ktonum.case.context import CaseContext
from ktonum.checks.nonfinite import CHECK
from ktonum.declare.drawing import Draw
from ktonum.ready_ops import cross_entropy
from ktonum.report.sentences import reason_words
from ktonum.results import CheckResult, Verdict
from subjects.op_defects import OPS
from subjects.planted import ALL, with_gradient


def _middle_ignored(name: str) -> Callable[[Draw], dict[str, Any]]:
    """Inputs whose middle row is ignored. The poison goes into that row."""

    def sample(draw: Draw) -> dict[str, Any]:
        inputs = OPS[name].sample(draw)
        target = inputs["target"]
        target[target.numel() // 2] = draw.parameters.get("ignore_index", -100)
        return inputs

    return sample


def judged(name: str, candidate: Callable[..., Any], dtype: str, at: int = 0) -> CheckResult:
    """The check's result at one of the op's quick points. The middle row is ignored."""
    op = replace(OPS[name], sample=_middle_ignored(name), candidate=candidate)
    case = op.cases(profile="quick", dtypes=[dtype], device="cpu")[at]
    return run_check(CHECK, CaseContext(op, case))


def _zero_where_ignored(rows: Tensor, target: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Skips ignored rows, as Liger-Kernel does. Their gradient is zero by definition."""
    ignored = (target == parameters.get("ignore_index", -100)).unsqueeze(1)
    read = torch.where(ignored, 0, rows)
    return with_gradient(read, lambda gradient: torch.where(ignored, 0, gradient))


def _skipping(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    return cross_entropy.upcast(logits=_zero_where_ignored(logits, target, parameters), target=target, **parameters)


def _fused_skipping(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
    wide = torch.promote_types(input.dtype, torch.float32)
    logits = torch.nn.functional.linear(
        _zero_where_ignored(input, target, rest).to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    )
    return cross_entropy.reference(_zero_where_ignored(logits, target, rest), target, **rest).to(input.dtype)


def _masked_by_a_product(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    """Multiplies ignored rows by zero: NaN stays NaN."""
    counted = (target != parameters.get("ignore_index", -100)).unsqueeze(1)
    return cross_entropy.upcast(logits=logits * counted, target=target, **parameters) + (0 * logits.detach()).sum()


def _nan_hidden(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    return cross_entropy.upcast(logits=logits.nan_to_num(), target=target, **parameters)


def _nan_of_the_head_hidden(input: Tensor, weight: Tensor, target: Tensor, **rest: Any) -> Tensor:
    return _fused_skipping(input, weight.nan_to_num(), target, **rest)


def _gradient_of_nan_hidden(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    """The loss is NaN, but its gradient is not."""
    return cross_entropy.upcast(logits=with_gradient(logits, torch.nan_to_num), target=target, **parameters)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("at", range(4))
def test_a_row_that_is_ignored_may_have_a_gradient_of_zero_or_nan(at: int, dtype: str) -> None:
    for candidate in (_skipping, cross_entropy.upcast, cross_entropy.torch_cross_entropy):
        result = judged("cross_entropy", candidate, dtype, at)
        assert result.verdict is Verdict.PASS and not result.vacuous, (candidate, result.reason)
        # An ignored element, and one that is not ignored.
        contexts = {m.context for m in result.measurements}
        assert contexts >= {"with NaN in logits that is ignored", "with NaN in logits"}


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("at", range(2))
def test_nan_in_a_head_need_not_reach_the_rows_that_are_ignored(at: int, dtype: str) -> None:
    for candidate in (_fused_skipping, OPS["fused_linear_cross_entropy"].reference):
        result = judged("fused_linear_cross_entropy", candidate, dtype, at)
        assert result.verdict is Verdict.PASS and not result.vacuous, (candidate, result.reason)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("candidate", [_masked_by_a_product, _nan_hidden, _gradient_of_nan_hidden])
def test_nan_that_is_hidden_or_spread_is_flagged_all_the_same(
    candidate: Callable[..., Any], at: int, dtype: str
) -> None:
    assert judged("cross_entropy", candidate, dtype, at).verdict is Verdict.FAIL


@pytest.mark.parametrize("dtype", ALL)
def test_nan_of_a_head_that_is_hidden_is_flagged_all_the_same(dtype: str) -> None:
    result = judged("fused_linear_cross_entropy", _nan_of_the_head_hidden, dtype)
    assert result.verdict is Verdict.FAIL and "NaN in weight" in reason_words(result)
