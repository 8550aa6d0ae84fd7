"""Defects planted in the ops of `ktonum.ready_ops`: small edits of the references, in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.cases import Point
from ktonum.declare.op import Op
from ktonum.ready_ops import cross_entropy, fused_linear_cross_entropy, layer_norm, rms_norm, swiglu
from ktonum.ready_ops.upcasting import rounded_once
from subjects.planted import ALL, Change, SummedInLowPrecision, last_row_zero, times, truncated_to_bf16, with_gradient

#: The ready ops by name.
OPS: dict[str, Op] = {
    module.OP.name: module.OP for module in (rms_norm, layer_norm, swiglu, cross_entropy, fused_linear_cross_entropy)
}


@dataclass(frozen=True)
class OpDefect:
    """A wrong candidate for the op, and the checks that must flag it at every quick point where it shows.

    ``not_at`` has names and values of parameters, and distributions, with which the defect changes nothing.
    """

    op: str
    name: str
    candidate: Callable[..., Any]
    flagged_by: tuple[str, ...]
    dtypes: tuple[str, ...] = ALL
    not_at: tuple[object, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.op}: {self.name}"

    def shows(self, point: Point) -> bool:
        """Whether the defect changes something that the checks of the point look at."""
        if point.checks and not {*point.checks} & {*self.flagged_by}:
            return False
        return not {*point.parameters, *point.parameters.values(), point.distribution} & set(self.not_at)


def _gradient(op: str, name: str, change: Change) -> Callable[..., Any]:
    """The right op, except that the gradient of one input goes through ``change``."""

    def wrong(**inputs: Any) -> Tensor:
        return OPS[op].reference(**{**inputs, name: with_gradient(inputs[name], change)})

    return rounded_once(wrong)


def _output(op: str, change: Change) -> Callable[..., Any]:
    return rounded_once(lambda **inputs: change(OPS[op].reference(**inputs)))


def _without(op: str, parameter: str) -> Callable[..., Any]:
    """The op with a parameter ignored."""
    return rounded_once(lambda **inputs: OPS[op].reference(**{k: v for k, v in inputs.items() if k != parameter}))


def _eps_outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def _not_centred(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def _unbiased(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (x.var(-1, keepdim=True) + eps).rsqrt() * weight + bias


def _gate_of_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    """The backward takes σ for a constant, so that its second term is missing."""
    return gate * torch.sigmoid(gate).detach() * up


def _halves_swapped(gate: Tensor, up: Tensor) -> Tensor:
    return up * torch.sigmoid(up) * gate


def _mean_over_all(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    """Ignored rows are counted in the mean."""
    loss = cross_entropy.reference(logits, target, **{**parameters, "reduction": "sum"})
    return loss / target.shape[0] if parameters.get("reduction", "mean") == "mean" else loss


def _ignored_gradient(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    """Ignored rows get the gradient of a softmax."""
    ignored = target == parameters.get("ignore_index", -100)

    def change(gradient: Tensor) -> Tensor:
        return torch.where(ignored.unsqueeze(1), gradient.abs().mean(), gradient)

    return cross_entropy.reference(with_gradient(logits, change), target, **parameters)


def _leans_on_logits(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    return cross_entropy.reference(logits, target, **parameters) * (1 + logits.detach().mean())


def _leans_on_last_row(op: str) -> Callable[..., Any]:
    return _output(op, lambda y: y * (1 + 1e-1 * y.detach()[-1, 0]))


def _last_class_missing(input: Tensor, weight: Tensor, target: Tensor, **rest: Any) -> Tensor:
    """The last class is missing in the log-sum-exp, as if the vocabulary were rounded down to whole tiles.

    The loss changes by one part in 2000, which a rounding to 16 bits hides. The gradient's row of that class is zero.
    """
    edge = torch.zeros(weight.shape[0], dtype=weight.dtype)
    edge[-1] = -1e4
    bias = rest.pop("bias", None)
    return fused_linear_cross_entropy.reference(input, weight, target, edge if bias is None else bias + edge, **rest)


def _added_in_bf16(op: str, *names: str) -> Callable[..., Any]:
    """The gradients of inputs that all rows share are added up row by row in bfloat16."""

    def wrong(**inputs: Any) -> Tensor:
        rows = inputs["x"].shape[0]
        return OPS[op].reference(
            **{k: SummedInLowPrecision.apply(v, rows) if k in names else v for k, v in inputs.items()}
        )

    return rounded_once(wrong)


def _head_added_in_bf16(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **rest: Any) -> Tensor:
    """The same for a head, whose gradient gets one addition for each chunk of tokens."""
    by_row = SummedInLowPrecision.apply(weight, input.shape[0])
    return cross_entropy.reference((by_row @ input.unsqueeze(2))[:, :, 0] + bias, target, **rest)


def _classes_added_in_bf16(logits: Tensor, target: Tensor, **parameters: Any) -> Tensor:
    """The log-sum-exp comes from a running sum in bfloat16. The gradient is right."""
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp().detach()
    total = torch.zeros(logits.shape[0], dtype=torch.bfloat16)
    for column in exponentials.unbind(1):
        total += column.to(torch.bfloat16)
    wrong = (total.to(logits.dtype) / exponentials.sum(-1)).log()
    counted = target != parameters.get("ignore_index", -100)
    return cross_entropy.reference(logits, target, **parameters) + wrong[counted].mean()


_BOTH = ("gradients", "gradcheck")

OP_DEFECTS = (
    *(
        OpDefect(op, "gradient scaled by 1.01", _gradient(op, x, times(1.01)), _BOTH)
        for op, x in (
            ("rms_norm", "x"),
            ("layer_norm", "x"),
            ("swiglu", "gate"),
            ("cross_entropy", "logits"),
            ("fused_linear_cross_entropy", "input"),
        )
    ),
    *(
        OpDefect(op, "last row of the gradient zero", _gradient(op, x, last_row_zero), _BOTH)
        for op, x in (
            ("rms_norm", "x"),
            ("layer_norm", "x"),
            ("swiglu", "up"),
            ("cross_entropy", "logits"),
            ("fused_linear_cross_entropy", "weight"),
        )
    ),
    *(
        OpDefect(op, "output truncated to bf16", _output(op, truncated_to_bf16), ("forward",))
        for op in ("rms_norm", "layer_norm", "swiglu")
    ),
    *(
        OpDefect(
            op, "rows depend on the last one", _leans_on_last_row(op), ("forward", "law:row-split", "law:permutation")
        )
        for op in ("rms_norm", "layer_norm", "swiglu")
    ),
    OpDefect(
        "rms_norm", "epsilon outside the root", rounded_once(_eps_outside), ("forward", "gradients"), not_at=(1e-6,)
    ),
    OpDefect(
        "layer_norm", "variance not centred", rounded_once(_not_centred), ("forward",), not_at=("normal", "outliers")
    ),
    OpDefect("layer_norm", "unbiased variance", rounded_once(_unbiased), ("forward", "gradients")),
    OpDefect("swiglu", "sigmoid's derivative missing", rounded_once(_gate_of_sigmoid), _BOTH),
    OpDefect("swiglu", "halves swapped", rounded_once(_halves_swapped), ("forward", "gradients")),
    OpDefect(
        "cross_entropy",
        "ignored rows counted",
        rounded_once(_mean_over_all),
        ("forward", "gradients"),
        not_at=("reduction",),
    ),
    OpDefect("cross_entropy", "ignored rows get a gradient", rounded_once(_ignored_gradient), _BOTH),
    OpDefect(
        "cross_entropy",
        "ignore_index is always -100",
        _without("cross_entropy", "ignore_index"),
        ("forward", "law:ignored-rows"),
        not_at=("normal", "grid"),
    ),
    OpDefect(
        "cross_entropy",
        "label smoothing ignored",
        _without("cross_entropy", "label_smoothing"),
        ("forward", "gradients"),
        not_at=("normal", "peaked", "reduction"),
    ),
    OpDefect(
        "cross_entropy",
        "loss leans on the logits' mean",
        rounded_once(_leans_on_logits),
        ("forward", "law:shift-invariance", "law:ignored-rows"),
        not_at=("normal", "peaked"),
    ),
    OpDefect("rms_norm", "weight gradient added up in bf16", _added_in_bf16("rms_norm", "weight"), ("growth",)),
    OpDefect("layer_norm", "bias gradient added up in bf16", _added_in_bf16("layer_norm", "bias"), ("growth",)),
    OpDefect("cross_entropy", "classes added up in bf16", rounded_once(_classes_added_in_bf16), ("growth",)),
    OpDefect(
        "fused_linear_cross_entropy", "weight gradient added up in bf16", rounded_once(_head_added_in_bf16), ("growth",)
    ),
    OpDefect("fused_linear_cross_entropy", "last class missing", rounded_once(_last_class_missing), ("gradients",)),
    OpDefect(
        "fused_linear_cross_entropy",
        "label smoothing ignored",
        _without("fused_linear_cross_entropy", "label_smoothing"),
        ("forward", "gradients"),
        not_at=("normal",),
    ),
)


def _rounded_off(op: str, name: str, change: Callable[[Tensor, float], Tensor]) -> Callable[..., Any]:
    """The right op, except that the gradient of one input is off by some roundings of the input's dtype."""
    right = rounded_once(OPS[op].reference)

    def wrong(**inputs: Any) -> Tensor:
        x: Tensor = inputs[name]
        u = torch.finfo(x.dtype).eps / 2
        return right(**{**inputs, name: with_gradient(x, lambda g: change(g.double(), u).to(g.dtype))})

    return wrong


def _noise(gradient: Tensor, size: float) -> Tensor:
    """Each element is off by ``size`` of itself, up or down. The signs follow no row and no column."""
    turns = torch.arange(gradient.numel(), dtype=torch.float64).mul(2.0**0.5).frac().ge(0.5).view(gradient.shape)
    return gradient * (1 + size * (2 * turns.double() - 1))


#: Defects of a few roundings. They were not chosen because the audit flags them: they show how small a defect it sees.
BORDERLINE = tuple(
    OpDefect(op, name, _rounded_off(op, x, change), ())
    for op, x in (("rms_norm", "x"), ("swiglu", "gate"), ("fused_linear_cross_entropy", "weight"))
    for roundings in (4, 16)
    for name, change in (
        (f"gradient off by ±{roundings} roundings", lambda g, u, k=roundings: _noise(g, k * u)),
        (f"gradient scaled by {roundings} roundings", lambda g, u, k=roundings: g * (1 + k * u)),
    )
)
