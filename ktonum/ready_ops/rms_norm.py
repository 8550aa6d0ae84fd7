r"""RMSNorm of each row: :math:`y = x \cdot w / \sqrt{\mathrm{mean}(x^2) + \varepsilon}`."""

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

__all__ = ["OP", "reference", "torch_rms_norm", "upcast"]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula; x (N, H), weight (H,), result (N, H), in their dtype."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


#: The reference in float32, rounded once.
upcast = rounded_once(reference)


def _sample(draw: Draw) -> dict[str, Any]:
    return {"x": activations(draw), "weight": draw.normal(draw.dims["H"], scale=0.2) + 1}


def _error_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """With r = 1 / rms and the mean m of g w x: y = x r w, ∂x = r g w − x r³ m, ∂w = Σ_rows g x r.

    Each element has a few roundings of its own. A row shares the errors of r and m.

    The error of a stored intermediate value is up to half the spacing of subnormals if the value is small. In float16,
    small elements among outliers are subnormal. Autograd of the formula also stores r³ m / 2, before it multiplies by
    2 x, which may be large.
    """
    a, s = arithmetic.accumulator, unit_roundoff(arithmetic.stored)
    x, w, g = inputs["x"].double(), inputs["weight"].double(), upstream["output"].double()
    rows, hidden = x.shape
    squares = x.square()
    total = squares.sum(-1, keepdim=True)
    r = (total / hidden + parameters["eps"]).rsqrt()
    fourth = squares.square().sum(-1, keepdim=True)
    # The relative error of r is half that of mean(x²) + ε, from the additions and from the rounding of every square.
    of_r = (summation_variance(hidden, total, fourth, a) + s**2 * fourth) * (r.square() / hidden / 2).square()
    shared = 3 * of_r.sqrt() + 3 * s
    products = g * w * x
    mean = products.mean(-1, keepdim=True)
    product_squares = products.square().sum(-1, keepdim=True)
    of_mean = summation_variance(hidden, products.sum(-1, keepdim=True), product_squares, a)
    of_mean = 3 * (of_mean + 2 * s**2 * product_squares).sqrt() / hidden + 3 * s * mean.abs()
    direct, through_r = (g * w * r).abs(), (x * r**3).abs()
    by_weight = g * x * r
    by_weight_squares = by_weight.square()
    tiny = subnormal_rounding(arithmetic.stored)
    # The errors among subnormals of r³ m / 2: of the terms g w and g w x, of the sum and of half of it, times r³,
    # divided by H.
    of_terms = 3 * (total.sqrt() + hidden**0.5) / 2 + 2
    lost = tiny * (1 + (1 + of_terms * r**3) / hidden)
    columns = summation_variance(rows, by_weight.sum(0), by_weight_squares.sum(0), a)
    return {
        "output": DerivedErrors(2 * s * (x * r * w).abs() + tiny * w.abs(), shared * (x * r * w).abs()),
        "grad_x": DerivedErrors(
            3 * s * (direct + through_r * mean.abs()) + tiny * (2 + r),
            shared * (direct + 3 * through_r * mean.abs()) + through_r * of_mean + 2 * lost * x.abs(),
        ),
        "grad_weight": DerivedErrors(
            ((by_weight_squares * (9 * of_r + 13 * s**2) + tiny**2 * (g.square() + 1)).sum(0) + columns).sqrt(),
            torch.zeros_like(w),
        ),
    }


_EPS = {"eps": 1e-6}
_PRODUCTION = ("forward", "gradients", "determinism")
# The check `growth` lets one dim grow at a time. The other dims stay small.
_GROWING = Point({"N": 5, "H": 48}, _EPS, checks=("growth",))
_POINTS = (
    Point({"N": 37, "H": 129}, _EPS),
    Point({"N": 5, "H": 300}, _EPS, "outliers"),
    Point({"N": 19, "H": 48}, {"eps": 1e-2}),
)
_QUICK = (*(point.but("growth") for point in _POINTS), _GROWING)
_LARGER = tuple(
    point.but("growth")
    for point in (
        Point({"N": 1, "H": 1}, _EPS, without=("law:row-split", "law:permutation")),
        Point({"N": 130, "H": 1025}, _EPS),
        Point({"N": 257, "H": 512}, _EPS, "outliers"),
    )
)

OP = Op(
    name="rms_norm",
    candidate="ktonum.ready_ops.rms_norm:torch_rms_norm",
    candidates={
        "torch": "ktonum.ready_ops.rms_norm:torch_rms_norm",
        "liger": "ktonum.ready_ops.liger_candidates:rms_norm",
        "upcast": "ktonum.ready_ops.rms_norm:upcast",
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
