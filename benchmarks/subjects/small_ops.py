"""Two small ops in plain PyTorch, their error models, and right candidates to plant defects in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, summation_variance, unit_roundoff
from ktonum.declare.cases import Point
from ktonum.declare.drawing import Draw
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation, Run
from ktonum.declare.op import Law, Op
from subjects.planted import Change, wide, with_gradient

LOSS_POINT = Point({"N": 9, "V": 37}, {"scale": 1.7})
NORM_POINT = Point({"N": 11, "H": 48}, {"eps": 1e-6})

Candidate = Callable[..., dict[str, Tensor]]
Receive = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _as_given(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs


def _prepared(receive: Receive, gradient: Mapping[str, Change], **inputs: Tensor) -> list[Tensor]:
    """The inputs as a kernel reads them: once, into the accumulator's dtype."""
    read = {k: wide(v) for k, v in receive(inputs).items()}
    return [with_gradient(v, gradient[k]) if k in gradient else v for k, v in read.items()]


def softmax_loss_with(
    *,
    receive: Receive = _as_given,
    gradient: Mapping[str, Change] | None = None,
    upstream: Change = _unchanged,
    logits: Change = _unchanged,
    output: Change = _unchanged,
) -> Candidate:
    """Mean over rows of −log softmax(scale · x)[target]; right unless something is planted."""

    def candidate(*, x: Tensor, target: Tensor, scale: float) -> dict[str, Tensor]:
        (read, labels) = _prepared(receive, gradient or {}, x=x, target=target)
        # Backwards, so that sums have another order than the reference's. A check must not take that for a defect.
        z = logits(scale * read).flip(0, 1)
        loss = torch.nn.functional.cross_entropy(z, z.shape[1] - 1 - labels.flip(0))
        return {"loss": output(with_gradient(loss.to(x.dtype), upstream))}

    return candidate


def rms_norm_with(
    *,
    receive: Receive = _as_given,
    gradient: Mapping[str, Change] | None = None,
    upstream: Change = _unchanged,
    normed: Change = _unchanged,
    stored: Change = _unchanged,
    output: Change = _unchanged,
) -> Candidate:
    """x / rms(x) · weight, by row; right unless something is planted."""

    def candidate(*, x: Tensor, weight: Tensor, eps: float) -> dict[str, Tensor]:
        (read, gain) = _prepared(receive, gradient or {}, x=x, weight=weight)
        y = normed(read / (read.flip(-1).square().mean(-1, keepdim=True) + eps).sqrt()) * gain
        return {"y": output(with_gradient(stored(y).to(x.dtype), upstream))}

    return candidate


def _loss_reference(*, x: Tensor, target: Tensor, scale: float) -> dict[str, Tensor]:
    return {"loss": torch.nn.functional.cross_entropy(scale * x, target)}


def _norm_reference(*, x: Tensor, weight: Tensor, eps: float) -> dict[str, Tensor]:
    return {"y": x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight}


def _sample_loss(draw: Draw) -> dict[str, Any]:
    rows, classes = draw.dims["N"], draw.dims["V"]
    return {"x": draw.normal(rows, classes), "target": draw.integers(rows, high=classes)}


def _sample_norm(draw: Draw) -> dict[str, Any]:
    rows, hidden = draw.dims["N"], draw.dims["H"]
    return {"x": draw.normal(rows, hidden), "weight": draw.normal(hidden)}


def _loss_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """Roundings of the logits, the exponentials, their sum and the mean; the log-sum-exp's is shared by a row."""
    u, s = unit_roundoff(arithmetic.accumulator), unit_roundoff(arithmetic.stored)
    z = parameters["scale"] * inputs["x"].double()
    rows, classes = z.shape
    logsumexp, p = z.logsumexp(-1, keepdim=True), z.softmax(-1)
    own = (s * z).square() + u**2 * (z - logsumexp).square() + 4 * u**2
    shared = (p.square() * own).sum(-1) + u**2 * (classes / 3 + logsumexp[:, 0].square())
    labels = inputs["target"].unsqueeze(1)
    loss = z.new_tensor(float(own.gather(1, labels).sum() + shared.sum())).sqrt() / rows + 4 * s
    slope = parameters["scale"] * float(upstream["loss"]) / rows
    bracket = (p - torch.zeros_like(p).scatter_(1, labels, 1.0)).abs()
    amplitude = abs(slope) * (p * own.sqrt() + 3 * s * bracket)
    return {
        "loss": DerivedErrors(loss, torch.zeros_like(loss)),
        "grad_x": DerivedErrors(amplitude, abs(slope) * 3 * shared.sqrt().unsqueeze(1) * p),
    }


def _norm_model(
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    oracle: Evaluation,
    arithmetic: Arithmetic,
) -> dict[str, DerivedErrors]:
    """A few roundings an element, and the inverse root mean square's, which a row shares."""
    a, s = arithmetic.accumulator, unit_roundoff(arithmetic.stored)
    x, w, g = inputs["x"].double(), inputs["weight"].double(), upstream["y"].double()
    rows, hidden = x.shape
    squares = x.square()
    total = squares.sum(-1, keepdim=True)
    r = (total / hidden + parameters["eps"]).rsqrt()
    by_row = summation_variance(hidden, total, squares.square().sum(-1, keepdim=True), a) / total.square() / 4
    by_row = by_row.nan_to_num()  # a sum of zeros has no error
    shared = 3 * by_row.sqrt() + 3 * s
    y, products = x * r * w, g * w * x
    mean = products.mean(-1, keepdim=True)
    of_mean = summation_variance(hidden, products.sum(-1, keepdim=True), products.square().sum(-1, keepdim=True), a)
    of_mean = (of_mean + 2 * s**2 * products.square().sum(-1, keepdim=True)).sqrt() / hidden
    by_weight = g * x * r
    columns = summation_variance(rows, by_weight.sum(0), by_weight.square().sum(0), a)
    return {
        "y": DerivedErrors(2 * s * y.abs(), shared * y.abs()),
        "grad_x": DerivedErrors(
            3 * s * ((g * w * r).abs() + (x * r**3 * mean).abs()),
            shared * ((g * w * r).abs() + 3 * (x * r**3 * mean).abs()) + 3 * (x * r**3).abs() * of_mean,
        ),
        "grad_weight": DerivedErrors(
            ((by_weight.square() * (by_row + 4 * s**2)).sum(0) + columns).sqrt(),
            3 * s * by_weight.sum(0).abs(),
        ),
    }


def _reversal(run: Run) -> list[Run]:
    rows = {"x", "target"}
    inputs = {k: v.flip(0) if k in rows else v for k, v in run.inputs.items()}
    return [Run(inputs, run.parameters, {k: v.flip(0) if v.dim() else v for k, v in run.upstream.items()})]


def _unreversed(parts: Sequence[Evaluation], run: Run) -> Evaluation:
    (part,) = parts
    outputs = {k: v.flip(0) if v is not None and v.dim() else v for k, v in part.outputs.items()}
    # Without gradients that are sums over rows: in another order they differ by roundings, and the law may be exact.
    x = part.gradients["x"]
    return Evaluation(outputs, {"x": None if x is None else x.flip(0)})


PERMUTATION = Law("permutation", _reversal, _unreversed)

SOFTMAX_LOSS = Op(
    name="softmax_loss",
    candidate=softmax_loss_with(),
    reference=_loss_reference,
    sample=_sample_loss,
    dims=[LOSS_POINT],
    laws=(PERMUTATION,),
    error_model=_loss_model,
    reductions=("N", "V"),
)
RMS_NORM = Op(
    name="rms_norm",
    candidate=rms_norm_with(),
    reference=_norm_reference,
    sample=_sample_norm,
    dims=[NORM_POINT],
    laws=(Law("permutation", _reversal, _unreversed, exact=True),),
    error_model=_norm_model,
    reductions=("N", "H"),
)
