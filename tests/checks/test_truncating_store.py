"""A store to bf16 that truncates in every output of `kto`, so values are 0.28 % too small on average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ktonum.auditing.in_process import audit_case
from ktonum.declare.cases import Case
from ktonum.kernels.audit.kto_op import OP
from ktonum.results import Verdict
from subjects.plain_kto import PlainKTO

# At this point `bias` draws inputs until every gradient's bias is known to a thousandth. The head has a bias here.
(POINT,) = (p for p in OP.points("quick") if p.checks == ("bias",))


def _truncated(tensor: Tensor) -> Tensor:
    """The upper half of a float32, as Triton's interpreter stores it to bf16."""
    return (tensor.contiguous().view(torch.int32) & -(2**16)).view(torch.float32)


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


class _ReadWide(torch.autograd.Function):
    """A bf16 input as float32; its gradient is stored to bf16 by ``store``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, store: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.store = store
        return tensor.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.store(gradient).bfloat16(), None


def _flagged(
    candidate: Any, store: Callable[[Tensor], Tensor], store_output: Callable[[Tensor], Tensor]
) -> dict[str, list[str]]:
    """For each tensor the measures beyond their bounds, if these functions store the candidate's float32 results."""

    def adapt(candidate: Any, parameters: Mapping[str, Any]) -> Callable[..., Any]:
        assert OP.adapt is not None
        kernels = OP.adapt(candidate, parameters)

        def run(**inputs: Any) -> dict[str, Any]:
            wide = {
                k: _ReadWide.apply(v, store) if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v
                for k, v in inputs.items()
            }
            outputs = kernels(**wide)
            return {k: v + (store_output(v.detach()) - v.detach()) for k, v in outputs.items() if v is not None}

        return run

    found: dict[str, list[str]] = {}
    point = replace(POINT, checks=("forward", "gradients", "bias"))
    for check in point.checks:
        result = audit_case(replace(OP, candidate=candidate, adapt=adapt), Case("kto", point, "bf16", "cpu"), check)
        assert result.verdict in (Verdict.PASS, Verdict.FAIL), result
        for m in result.measurements:
            beyond = [] if m.within else [m.measure]
            found.setdefault(m.tensor, []).extend(beyond)
    return found


@pytest.mark.parametrize("candidate", [PlainKTO, pytest.param(OP.candidate, marks=pytest.mark.exhaustive)])
def test_truncation_is_flagged_in_every_tensor_and_rounding_in_none(candidate: Any) -> None:
    found = _flagged(candidate, _truncated, _truncated)
    assert len(found) == 10 and {"loss", "grad_input", "grad_weight", "grad_bias"} <= set(found)
    assert all(found.values()), found
    for name in ("grad_input", "grad_weight", "grad_bias"):
        assert "bias" in found[name], found[name]
    # The loss and the metrics of bf16 inputs are float32.
    right = _flagged(candidate, _rounded, lambda output: output)
    assert right.keys() == found.keys() and not any(right.values()), right
