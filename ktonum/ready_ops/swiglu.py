r"""SwiGLU, elementwise: :math:`y = a \, \sigma(a) \, b` for the two halves a, b of a gated feed-forward layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import FUNCTION_BIAS, Arithmetic, subnormal_rounding, unit_roundoff
from ktonum.declare.cases import Point
from ktonum.declare.drawing import Draw
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation
from ktonum.declare.op import Op
from ktonum.errors import UsageError
from ktonum.ready_ops.row_laws import row_laws
from ktonum.ready_ops.upcasting import rounded_once

__all__ = ["OP", "reference", "torch_swiglu", "upcast"]

# Standard deviation of the gate in `wide`. A larger one makes many gates saturate, so that silu equals the gate. Its
# product with an upstream gradient of few bits is then often a tie of 16-bit rounding, and such ties are always broken
# in the same way. This gives a bias of 2e-4, also with correct rounding.
_WIDE = 3.0


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula; gate, up and result (N, H), in their dtype."""
    return gate * torch.sigmoid(gate) * up


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`torch.nn.functional.silu` of the gate times the other half, as in the code of models."""
    return torch.nn.functional.silu(gate) * up


#: The reference in float32, rounded once.
upcast = rounded_once(reference)


def _sample(draw: Draw) -> dict[str, Any]:
    if draw.distribution not in ("normal", "wide"):
        raise UsageError(f"unknown distribution {draw.distribution!r}: use normal or wide")
    rows, hidden = draw.dims["N"], draw.dims["H"]
    return {
        "gate": draw.normal(rows, hidden, scale=_WIDE if draw.distribution == "wide" else 1.0),
        "up": draw.normal(rows, hidden),
    }


def _error_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """σ has the errors of e^−a and of the quotient. ∂a = g b (σ + a σ (1 − σ)) depends twice on this same σ.

    All elements share the mean error, over arguments, of the exponential and of the quotient. The error of a stored
    intermediate value is up to half the spacing of subnormals if the value is small, as small sigmoids are in float16.
    Where 1 + e^−a overflows, σ = 1 / (1 + e^−a) is lost completely.
    """
    u, s = unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored)
    a, b, g = inputs["gate"].double(), inputs["up"].double(), upstream["output"].double()
    sigma = torch.sigmoid(a)
    # Relative error of σ: that of the exponential is at most |a| + 2 roundings, times the exponential's share 1 − σ of
    # 1 + e^−a. The sum and the quotient add two roundings.
    of_sigma = u * ((1 - sigma) * (a.abs() + 2) + 2) + s
    of_sigma = torch.where(sigma * torch.finfo(arithmetic.accumulator).max < 1, of_sigma.clamp(min=1.0), of_sigma)
    silu = a * sigma
    slope = sigma + a.abs() * sigma * (1 - sigma)
    of_slope = (1 + a * (1 - 2 * sigma)).abs() * sigma * of_sigma + 4 * s * slope
    tiny = subnormal_rounding(arithmetic.stored)
    lost = tiny * (1 + a.abs())  # of σ, times a, and of silu
    shared = FUNCTION_BIAS * u * (2 - sigma)  # of the quotient, and of the exponential, times its share 1 − σ
    shared_slope = (1 + a * (1 - 2 * sigma)).abs() * sigma * shared
    own, own_slope = silu.abs() * (of_sigma + 2 * s) + lost, of_slope + 2 * lost
    # The errors of storing σ or silu. They are not random where σ or silu saturates.
    by_sigma, by_silu = (t.to(arithmetic.stored).double() - t for t in (sigma, silu))
    slope_by_sigma = (1 + a * (1 - 2 * sigma)) * by_sigma

    def bias(factor: Tensor, exact: Tensor, *stored: Tensor) -> float:
        if arithmetic.stored == arithmetic.accumulator:
            return 0.0
        e = factor * exact
        found = sum(abs(float((factor * t * e).sum())) for t in stored) / (float(e.square().sum()) or 1.0)
        return found if math.isfinite(found) else 0.0  # not finite if something overflows

    return {
        "output": DerivedErrors(b.abs() * own, (silu * b).abs() * shared, bias(b, silu, a * by_sigma, by_silu)),
        "grad_up": DerivedErrors(g.abs() * own, (g * silu).abs() * shared, bias(g, silu, a * by_sigma, by_silu)),
        "grad_gate": DerivedErrors(
            (g * b).abs() * own_slope + tiny * (2 + a.abs()),
            (g * b).abs() * shared_slope,
            bias(g * b, sigma + silu * (1 - sigma), slope_by_sigma),
        ),
    }


_PRODUCTION = ("forward", "gradients", "determinism")
_QUICK = (Point({"N": 37, "H": 129}), Point({"N": 5, "H": 300}, {}, "wide"))

OP = Op(
    name="swiglu",
    candidate="ktonum.ready_ops.swiglu:torch_swiglu",
    candidates={
        "torch": "ktonum.ready_ops.swiglu:torch_swiglu",
        "liger": "ktonum.ready_ops.liger_candidates:swiglu",
        "upcast": "ktonum.ready_ops.swiglu:upcast",
    },
    reference=reference,
    sample=_sample,
    dims={
        "quick": _QUICK,
        "full": (
            *_QUICK,
            Point({"N": 1, "H": 1}, without=("law:row-split", "law:permutation")),
            Point({"N": 130, "H": 1025}, {}, "wide"),
            Point({"N": 257, "H": 512}),
            *(
                Point({"N": N, "H": H}, {}, "wide", _PRODUCTION, devices=("cuda",))
                for N, H in ((8192, 14_336), (4096, 11_008))
            ),
        ),
    },
    laws=row_laws("gate", "up"),
    error_model=_error_model,
)
