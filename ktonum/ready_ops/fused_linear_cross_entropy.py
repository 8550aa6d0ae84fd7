"""Softmax cross-entropy of a language-model head: `cross_entropy` of logits = input · weightᵀ + bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, subnormal_rounding, summation_variance, unit_roundoff
from ktonum.declare.cases import Point
from ktonum.declare.drawing import Draw
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation
from ktonum.declare.op import Op
from ktonum.ready_ops import cross_entropy
from ktonum.ready_ops.row_laws import row_laws
from ktonum.ready_ops.softmax_errors import LabelledRows, loss_errors
from ktonum.ready_ops.upcasting import rounded_once

__all__ = ["OP", "reference", "torch_fused_linear_cross_entropy", "upcast"]

# The standard deviation of the logits.
_SCALE = 1.5


def reference(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **parameters: Any) -> Tensor:
    """The formula; input (N, H), weight (V, H), target (N,) int64, bias (V,); see `cross_entropy.reference`."""
    return cross_entropy.reference(torch.nn.functional.linear(input, weight, bias), target, **parameters)


def torch_fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **parameters: Any
) -> Tensor:
    """`torch.nn.functional.linear` and `torch.nn.functional.cross_entropy`."""
    return cross_entropy.torch_cross_entropy(torch.nn.functional.linear(input, weight, bias), target, **parameters)


#: The reference in float32, rounded once.
upcast = rounded_once(reference)


def _sample(draw: Draw) -> dict[str, Any]:
    rows, hidden, classes = (draw.dims[k] for k in "NHV")
    inputs: dict[str, Any] = {
        "input": draw.normal(rows, hidden),
        "weight": draw.normal(classes, hidden, scale=_SCALE * hidden**-0.5),
        "target": cross_entropy.sampled_targets(draw),
    }
    if draw.distribution == "bias":
        inputs["bias"] = draw.normal(classes, scale=0.5)
    return inputs


def _error_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """With the gradient c e_v of the logits, ∂x = Σ_v c e_v w_v and ∂w_v = Σ_rows c e_v x.

    Logits have the error of the accumulation of their product; `eager` rounds them too. The gradients have the errors
    of p, one rounding of each operand c e_v, and the error of their own accumulation.
    """
    x, w = inputs["input"].double(), inputs["weight"].double()
    bias = inputs.get("bias")
    rows, hidden = x.shape
    classes = w.shape[0]
    u, s, operand = (unit_roundoff(d) for d in (arithmetic.accumulator, arithmetic.stored, arithmetic.operands))
    x2, w2 = x.square(), w.square()
    products = x @ w.T
    logits = products if bias is None else products + bias.double()
    variance = summation_variance(hidden, products, x2 @ w2.T, arithmetic.accumulator)
    variance += (1 if bias is None else 2) * (s * logits).square() + (arithmetic.truncation(hidden) * products).square()
    labelled = LabelledRows.of(logits, variance, inputs["target"], upstream["output"], parameters)
    output, of_logits = loss_errors(labelled, arithmetic)
    error = labelled.error
    # Each c e_v is an operand. It is rounded once. If it is small, the error is up to half the spacing of subnormals.
    tiny = subnormal_rounding(arithmetic.operands)
    rounding = (operand * error).square() + tiny**2 * (error != 0)
    own = of_logits.independent.square() + rounding

    def accumulated(total: Tensor, squares: Tensor, terms: int) -> Tensor:
        return summation_variance(terms, total, squares, arithmetic.accumulator)

    of_x, of_w = error @ w, error.T @ x
    errors = {
        "output": output,
        "grad_input": DerivedErrors(
            (own @ w2 + accumulated(of_x, error.square() @ w2, classes)).sqrt(),
            # The terms of a row share this error with their signs. So its sum may cancel like the gradient itself.
            _shared_by_row(labelled, arithmetic, w) + arithmetic.truncation(classes) * of_x.abs(),
        ),
        "grad_weight": DerivedErrors(
            (own.T @ x2 + (of_logits.coherent.square().T @ x2) + accumulated(of_w, error.square().T @ x2, rows)).sqrt(),
            (arithmetic.truncation(rows) + 4 * s + u) * of_w.abs(),
        ),
    }
    if bias is not None:
        of_b = error.sum(0)
        by_class = own.sum(0) + of_logits.coherent.square().sum(0) + accumulated(of_b, error.square().sum(0), rows)
        errors["grad_bias"] = DerivedErrors(by_class.sqrt(), (4 * s + u) * of_b.abs())
    return errors


def _shared_by_row(rows: LabelledRows, arithmetic: Arithmetic, weight: Tensor) -> Tensor:
    """Effect of the errors of ℓ and of the stored coefficients on ∂x = c (Σ_v p_v w_v − Σ_v q_v w_v), (N, H)."""
    s, c = unit_roundoff(arithmetic.stored), rows.coefficients.abs().unsqueeze(1)
    predicted, wanted = (rows.logits.softmax(-1) @ weight).abs(), (rows.target @ weight).abs()
    smoothing = rows.smoothing_underflow(arithmetic) * (len(weight) * predicted + weight.sum(0).abs())
    return c * (3 * rows.logsumexp_variance(arithmetic).sqrt() * predicted + 2 * s * (predicted + wanted)) + smoothing


_PRODUCTION = ("forward", "gradients", "determinism")
# The check `growth` lets one dim grow at a time. The other dims stay small.
_GROWING = Point({"N": 5, "H": 24, "V": 40}, {}, "bias", ("growth",))
_POINTS = (
    Point({"N": 37, "H": 70, "V": 301}),
    Point({"N": 11, "H": 48, "V": 129}, {"label_smoothing": 0.1, "ignore_index": 5}, "bias"),
)
_QUICK = (*(point.but("growth") for point in _POINTS), _GROWING)
_LARGER = tuple(
    point.but("growth")
    for point in (
        Point({"N": 129, "H": 257, "V": 1025}, {"reduction": "sum"}, "bias"),
        Point({"N": 128, "H": 256, "V": 512}, {"label_smoothing": 0.3}),
    )
)

OP = Op(
    name="fused_linear_cross_entropy",
    candidate="ktonum.ready_ops.fused_linear_cross_entropy:torch_fused_linear_cross_entropy",
    candidates={
        "torch": "ktonum.ready_ops.fused_linear_cross_entropy:torch_fused_linear_cross_entropy",
        "liger": "ktonum.ready_ops.liger_candidates:fused_linear_cross_entropy",
        "upcast": "ktonum.ready_ops.fused_linear_cross_entropy:upcast",
    },
    reference=reference,
    sample=_sample,
    dims={
        "quick": _QUICK,
        "full": (
            *_QUICK,
            *_LARGER,
            *(
                Point({"N": N, "H": 2048, "V": V}, checks=_PRODUCTION, devices=("cuda",))
                for N, V in ((1000, 128_256), (509, 151_936))
            ),
        ),
    },
    laws=(
        *row_laws("input", "target", counted=cross_entropy.scored_rows),
        cross_entropy.ignored_rows_law("input"),
    ),
    differentiable=("input", "weight", "bias"),
    error_model=_error_model,
    reductions=("N", "H", "V"),
)
