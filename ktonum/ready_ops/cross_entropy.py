r"""Softmax cross-entropy of rows of logits, with ignored rows and label smoothing.

A row's loss is :math:`(1 - \epsilon)(\ell - z_y) + \epsilon (\ell - \bar z)`, with the log-sum-exp :math:`\ell` of the
logits z, their mean :math:`\bar z`, the target's logit :math:`z_y` and the label smoothing :math:`\epsilon`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic
from ktonum.declare.cases import Point
from ktonum.declare.drawing import Draw
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation, Run
from ktonum.declare.op import Law, Op
from ktonum.errors import UsageError
from ktonum.ready_ops.row_laws import row_laws
from ktonum.ready_ops.softmax_errors import LabelledRows, loss_errors
from ktonum.ready_ops.upcasting import rounded_once

__all__ = ["OP", "ignored_rows_law", "reference", "sampled_targets", "scored_rows", "torch_cross_entropy", "upcast"]

_SCALE = 2.0
_PEAKED = 12.0
# Multiples of this up to 16 are exact in bfloat16. So are the logits of `grid` and their sums with `_SHIFT`.
_GRID = 0.125
_SHIFT = 4.0


def reference(
    logits: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """The formula; logits (N, V), target (N,) int64, result (N,) for ``none``, else a number, in the logits' dtype.

    Ignored rows have no loss. A mean is taken over the other rows.
    """
    counted = target != ignore_index
    logps = logits.log_softmax(-1)
    hit = logps.gather(1, torch.where(counted, target, 0).unsqueeze(1))[:, 0]
    losses = -(1 - label_smoothing) * hit
    if label_smoothing:  # without smoothing, a logit of −∞ would give 0 · ∞ here
        losses = losses - label_smoothing * logps.mean(-1)
    losses = torch.where(counted, losses, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def torch_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """`torch.nn.functional.cross_entropy`."""
    return torch.nn.functional.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


#: The reference in float32, rounded once.
upcast = rounded_once(reference)


def sampled_targets(draw: Draw) -> Tensor:
    """A class for each row, (N,) int64. About a third of the rows are ignored: always the first, never the last."""
    target = draw.integers(draw.dims["N"], high=draw.dims["V"])
    ignored = draw.booleans(draw.dims["N"], probability=0.3)
    ignored[0], ignored[-1] = True, False
    return torch.where(ignored, draw.parameters.get("ignore_index", -100), target)


def _sample(draw: Draw) -> dict[str, Any]:
    logits = draw.normal(draw.dims["N"], draw.dims["V"], scale=_PEAKED if draw.distribution == "peaked" else _SCALE)
    if draw.distribution == "grid":
        logits = ((logits.float() / _GRID).round() * _GRID).clamp(-12, 12).to(draw.dtype)
    elif draw.distribution not in ("normal", "peaked"):
        raise UsageError(f"unknown distribution {draw.distribution!r}: use normal, peaked or grid")
    return {"logits": logits, "target": sampled_targets(draw)}


def scored_rows(run: Run) -> int:
    """The number of rows that the mean is taken over; 0 if the reduction is not a mean."""
    ignored = run.inputs["target"] == run.parameters.get("ignore_index", -100)
    return int((~ignored).sum()) if run.parameters.get("reduction", "mean") == "mean" else 0


def _error_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """Logits are inputs, without error of their own."""
    logits = inputs["logits"].double()
    rows = LabelledRows.of(logits, torch.zeros_like(logits), inputs["target"], upstream["output"], parameters)
    output, gradient = loss_errors(rows, arithmetic)
    return {"output": output, "grad_logits": gradient}


def _shifted(run: Run) -> list[Run] | None:
    """All logits plus a constant; None if that is not exact."""
    logits = run.inputs["logits"]
    moved = logits + _SHIFT
    if not bool((moved - _SHIFT == logits).all()):
        return None
    return [Run({**run.inputs, "logits": moved}, run.parameters, run.upstream)]


def _unchanged(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    (part,) = parts
    return part


def ignored_rows_law(name: str) -> Law:
    """The law that other values in ignored rows of the input ``name`` change nothing."""

    def changed(run: Run) -> list[Run] | None:
        ignored = run.inputs["target"] == run.parameters.get("ignore_index", -100)
        if not bool(ignored.any()):
            return None
        values = torch.where(ignored.unsqueeze(1), 1.0 - 3.0 * run.inputs[name], run.inputs[name])
        return [Run({**run.inputs, name: values}, run.parameters, run.upstream)]

    return Law("ignored rows", changed, _unchanged)


_INEXACT = ("law:shift-invariance",)
_PRODUCTION = ("forward", "gradients", "determinism")
# The check `growth` lets one dim grow at a time. The other dims stay small.
_GROWING = Point({"N": 5, "V": 48}, checks=("growth",))
_POINTS = (
    Point({"N": 37, "V": 129}, without=_INEXACT),
    Point({"N": 9, "V": 300}, {"label_smoothing": 0.1}, "grid"),
    Point({"N": 11, "V": 1023}, {"ignore_index": 5, "reduction": "sum"}, "peaked", without=_INEXACT),
    Point({"N": 13, "V": 50}, {"reduction": "none"}, "grid"),
)
_QUICK = (*(point.but("growth") for point in _POINTS), _GROWING)
_LARGER = tuple(
    point.but("growth")
    for point in (
        Point({"N": 1, "V": 1}, without=(*_INEXACT, "law:row-split", "law:permutation", "law:ignored-rows")),
        Point({"N": 130, "V": 4097}, {"label_smoothing": 0.3}, "peaked", without=_INEXACT),
        Point({"N": 257, "V": 512}, {}, "grid"),
    )
)

OP = Op(
    name="cross_entropy",
    candidate="ktonum.ready_ops.cross_entropy:torch_cross_entropy",
    candidates={
        "torch": "ktonum.ready_ops.cross_entropy:torch_cross_entropy",
        "liger": "ktonum.ready_ops.liger_candidates:cross_entropy",
        "upcast": "ktonum.ready_ops.cross_entropy:upcast",
    },
    reference=reference,
    sample=_sample,
    dims={
        "quick": _QUICK,
        "full": (
            *_QUICK,
            *_LARGER,
            *(
                Point({"N": N, "V": V}, {}, "normal", _PRODUCTION, devices=("cuda",))
                for N, V in ((2048, 128_256), (1000, 151_936))
            ),
        ),
    },
    laws=(
        *row_laws("logits", "target", counted=scored_rows),
        ignored_rows_law("logits"),
        Law("shift invariance", _shifted, _unchanged),
    ),
    error_model=_error_model,
    reductions=("N", "V"),
)
