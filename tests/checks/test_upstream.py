"""The check `upstream`: an upstream gradient that the candidate overwrites, and loss scaling of subnormal gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.case.variants import varied
from ktonum.checks.check import held_to_bounds
from ktonum.checks.upstream import CHECK
from ktonum.declare.cases import Point
from subjects.op_defects import OPS
from subjects.small_ops import NORM_POINT, RMS_NORM, rms_norm_with


def _overwritten(gradient: Tensor) -> Tensor:
    kept = gradient.clone()
    if 0 not in gradient.stride():
        gradient.zero_()
    return kept


def test_an_overwritten_upstream_gradient_is_flagged_and_does_not_reach_the_oracle() -> None:
    op = replace(RMS_NORM, candidate=rms_norm_with(upstream=_overwritten), dims=[NORM_POINT])
    (case,) = op.cases(profile="quick", dtypes=["fp16"], device="cpu")
    assert CHECK.probes is not None
    probes = CHECK.probes(CaseContext(op, case))
    beyond = {m.name for probe in probes for m in probe.measure(probe.actual, "precise") if not m.within}
    # The gradients are right. Once, the oracle for subnormal gradients got the upstream gradient that the candidate had
    # overwritten. Liger-Kernel's RMSNorm overwrites it, and seemed to be off by 146 times its bound.
    assert beyond == {
        f"upstream_y {words}/differing_elements" for words in ("at negatives among zeros", "at subnormal gradients")
    }


class _SmoothedLoss(torch.autograd.Function):
    """Computes in float32, but stores c q in the dtype before it sums it, as autograd of the formula does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        log_softmax = logits.float().log_softmax(1)
        counted = (target >= 0).unsqueeze(1)
        wanted = torch.full_like(log_softmax, smoothing / logits.shape[1])
        wanted.scatter_add_(1, target.clamp(min=0).unsqueeze(1), torch.full_like(wanted[:, :1], 1 - smoothing))
        ctx.save_for_backward(log_softmax, wanted * counted / counted.sum())
        return -(wanted * counted * log_softmax).sum().div(counted.sum()).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_softmax, wanted = ctx.saved_tensors
        stored = (gradient.float() * wanted).to(gradient.dtype).float()
        return (log_softmax.exp() * stored.sum(1, keepdim=True) - stored).to(gradient.dtype), None, None


def test_eager_allows_the_smaller_of_two_runs_to_lose_subnormals() -> None:
    op = replace(
        OPS["cross_entropy"],
        candidate=lambda logits, target, label_smoothing: _SmoothedLoss.apply(logits, target, label_smoothing),
        dims=[Point({"N": 16, "V": 4097}, {"label_smoothing": 0.3}, "peaked")],
    )
    (case,) = op.cases(profile="quick", dtypes=["fp16"], device="cpu")
    context = CaseContext(op, case)
    context = varied(context, upstream={k: v / 32 for k, v in context.upstream.items()})
    assert CHECK.probes is not None
    (probe,) = (p for p in CHECK.probes(context) if "scaled by" in p.context)
    assert (probe.tensor, probe.context) == ("grad_logits", "scaled by 2^8")
    assert all(m.within for m in probe.measure(probe.actual, "eager"))
    assert not all(m.within for m in probe.measure(1.5 * probe.actual, "eager"))
    # The larger run loses nothing, so twice its bound is not enough.
    larger = varied(context, upstream={k: v * 2.0**8 for k, v in context.upstream.items()})
    (alone,) = held_to_bounds(
        larger,
        actual={"grad_logits": larger.result.tensors()["grad_logits"]},
        expected={"grad_logits": context.result.tensors()["grad_logits"].double() * 2.0**8},
        scale=2.0,
    )
    assert not all(m.within for m in alone.measure(alone.actual, "eager"))
