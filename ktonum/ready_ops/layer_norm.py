r"""LayerNorm of each row: :math:`y = (x - \mathrm{mean}(x)) \cdot w / \sqrt{\mathrm{var}(x) + \varepsilon} + b`."""

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
from ktonum.ready_ops.activations import activations
from ktonum.ready_ops.row_laws import row_laws
from ktonum.ready_ops.upcasting import rounded_once

__all__ = ["OP", "reference", "torch_layer_norm", "upcast"]


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula with the biased variance; x (N, H), weight and bias (H,), result (N, H), in their dtype."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


#: The reference in float32, rounded once.
upcast = rounded_once(reference)


def _sample(draw: Draw) -> dict[str, Any]:
    hidden = draw.dims["H"]
    return {
        "x": activations(draw),
        "weight": draw.normal(hidden, scale=0.2) + 1,
        "bias": draw.normal(hidden, scale=0.1),
    }


def _error_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """With c = x − mean(x), r = 1 / std and ĉ = c r: y = ĉ w + b, ∂x = r (g w − mean(g w) − ĉ mean(g w ĉ)).

    ∂w = Σ_rows g ĉ and ∂b = Σ_rows g. Each element has a few roundings of its own. A row shares the errors of the mean,
    of r and of the two means in ∂x. The error of the mean changes c, but to first order it does not change Σ c².

    The error of a stored intermediate value is up to half the spacing of subnormals if the value is small. This is also
    true of the two means in ∂x. Autograd of the formula multiplies one of them by 2 c, which may be large.
    """
    a, s = arithmetic.accumulator, unit_roundoff(arithmetic.stored)
    x, w, g = inputs["x"].double(), inputs["weight"].double(), upstream["output"].double()
    rows, hidden = x.shape

    def of_row_mean(terms: Tensor, roundings: float) -> Tensor:
        """Error of a row's mean: from the additions, from rounding the terms, and from rounding the mean; (N, 1)."""
        total, squares = terms.sum(-1, keepdim=True), terms.square().sum(-1, keepdim=True)
        variance = summation_variance(hidden, total, squares, a) + roundings * s**2 * squares
        error: Tensor = 3 * variance.sqrt() / hidden + 3 * s * total.abs() / hidden
        return error

    of_mean = of_row_mean(x, 0)
    centred = x - x.mean(-1, keepdim=True)
    squares = centred.square()
    r = (squares.mean(-1, keepdim=True) + parameters["eps"]).rsqrt()
    # The relative error of r is half that of the variance, plus the roundings of the variance, of its sum with ε and of
    # the root.
    of_r = of_row_mean(squares, 2) * r.square() / 2 + 3 * s
    normed, weighted = centred * r, g * w
    through = normed * (weighted * normed).mean(-1, keepdim=True)
    mean_weighted, mean_through = weighted.mean(-1, keepdim=True), (weighted * normed).mean(-1, keepdim=True)
    # Autograd of the formula adds the two terms before it takes the mean.
    of_weighted = of_row_mean(weighted, 1) + of_row_mean(through, 4)
    of_through = of_row_mean(weighted * normed, 3) + of_mean * r * mean_weighted.abs()
    tiny = subnormal_rounding(arithmetic.stored)
    # The errors among subnormals of mean(g w c) r³ / 2: of the terms g w and g w c, of the sum and of half of it, times
    # r³, divided by H.
    of_terms = 3 * (squares.sum(-1, keepdim=True).sqrt() + hidden**0.5) / 2 + 2
    lost = tiny * (1 + (1 + of_terms * r**3) / hidden)
    size = (weighted.abs() + mean_weighted.abs() + through.abs()) * r
    by_weight, by_bias = g * normed, g
    # The product g ĉ is also stored, before it is summed.
    weight_variance = (
        by_weight.square() * (of_r.square() + 9 * s**2) + (g * r * of_mean).square() + tiny**2 * (g.square() + 1)
    ).sum(0)

    def of_column_sum(terms: Tensor) -> Tensor:
        return summation_variance(rows, terms.sum(0), terms.square().sum(0), a)

    return {
        "output": DerivedErrors(
            s * (3 * (normed * w).abs() + (normed * w + inputs["bias"].double()).abs()) + tiny * (1 + w.abs()),
            of_r * (normed * w).abs() + of_mean * r * w.abs(),
        ),
        "grad_x": DerivedErrors(
            4 * s * size + tiny * (2 + r),
            of_r * (size + 2 * r * through.abs())
            + r * (of_weighted + normed.abs() * of_through + r * of_mean * mean_through.abs())
            + 2 * lost * centred.abs()
            + tiny * (1 + 1 / hidden),
        ),
        "grad_weight": DerivedErrors((weight_variance + of_column_sum(by_weight)).sqrt(), torch.zeros_like(w)),
        "grad_bias": DerivedErrors(of_column_sum(by_bias).sqrt(), torch.zeros_like(w)),
    }


_EPS = {"eps": 1e-5}
_PRODUCTION = ("forward", "gradients", "determinism")
# The check `growth` lets one dim grow at a time. The other dims stay small.
_GROWING = Point({"N": 5, "H": 48}, _EPS, checks=("growth",))
_POINTS = (
    Point({"N": 37, "H": 129}, _EPS),
    Point({"N": 5, "H": 300}, _EPS, "outliers"),
    Point({"N": 19, "H": 70}, {"eps": 1e-2}, "shifted"),
)
_QUICK = (*(point.but("growth") for point in _POINTS), _GROWING)
_LARGER = tuple(
    point.but("growth")
    for point in (
        Point({"N": 130, "H": 1025}, _EPS, "shifted"),
        Point({"N": 257, "H": 512}, _EPS, "outliers"),
    )
)

OP = Op(
    name="layer_norm",
    candidate="ktonum.ready_ops.layer_norm:torch_layer_norm",
    candidates={
        "torch": "ktonum.ready_ops.layer_norm:torch_layer_norm",
        "liger": "ktonum.ready_ops.liger_candidates:layer_norm",
        "upcast": "ktonum.ready_ops.layer_norm:upcast",
    },
    reference=reference,
    sample=_sample,
    dims={
        "quick": _QUICK,
        "full": (
            *_QUICK,
            *_LARGER,
            *(
                Point({"N": N, "H": H}, _EPS, "outliers", _PRODUCTION, devices=("cuda",))
                for N, H in ((8192, 4096), (16_384, 5120))
            ),
        ),
    },
    laws=row_laws("x"),
    error_model=_error_model,
    reductions=("N", "H"),
)
