"""Gradients for several kinds of upstream gradients: expanded, negative among zeros, scaled, tiny.

A backward that ignores its upstream gradient looks right if that is 1, as it usually is. A backward that ignores
strides looks right if the upstream gradient is contiguous. Loss scaling needs gradients that scale exactly with powers
of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ktonum.bounds import ErrorBound, standard_named
from ktonum.case.context import CaseContext
from ktonum.case.variants import varied
from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.declare.evaluation import Run
from ktonum.declare.tensor_copies import spaced_out
from ktonum.measure.probe import Probe, bounded_probe, equality_probe
from ktonum.results import Measurement

__all__ = ["CHECK"]

# Exponents of loss scaling: the usual one, and a negative one for gradients that are too large for that.
_SCALING, _DOWNWARDS = 8, -4
# Intermediate values of a backward may be larger than its result by this factor, because they may cancel in the end.
_HEADROOM = 16.0


def _probes(context: CaseContext) -> list[Probe]:
    if not context.upstream:
        raise Inapplicable("the reference has no differentiable outputs")
    # In the outputs' dtypes: autograd converts other dtypes, and passes on a contiguous copy.
    outputs = context.result.tensors()
    base = {k: v.to(outputs[k].dtype) for k, v in context.upstream.items()}
    probes = [
        *_sent(context, {k: torch.ones_like(v) for k, v in base.items()}, _expanded, "at expanded ones"),
        *_sent(context, {k: _negative_among_zeros(v) for k, v in base.items()}, _spaced, "at negatives among zeros"),
        *_scaled(context, base),
    ]
    if context.dtype == torch.float16:
        probes += _sent(context, _tiny(context, base), _copied, "at subnormal gradients")
    return probes


def _sent(
    context: CaseContext, values: Mapping[str, Tensor], layout: Callable[[Tensor], Tensor], words: str
) -> list[Probe]:
    """Gradients for the upstream gradients ``values``, in another layout. The candidate must not change them."""
    sent = {k: layout(v) for k, v in values.items()}
    actual = context.evaluate(Run(context.inputs, context.parameters, sent))
    # These values need their own oracle and bounds, because errors scale with the upstream gradient of each element.
    case = varied(context, upstream=values)
    expected = {f"grad_{k}": v for k, v in case.oracle.gradients.items() if v is not None}
    unmodified = [
        equality_probe(
            f"upstream_{k}",
            actual=sent[k],
            expected=v,
            law="upstream gradients stay unchanged",
            context=words,
        )
        for k, v in values.items()
    ]
    return [*held_to_bounds(case, actual=actual.tensors(), expected=expected, where=words), *unmodified]


def _expanded(tensor: Tensor) -> Tensor:
    """One number with strides of zero, as the backward of a sum passes it on."""
    return tensor.new_ones(()).expand(tensor.shape)


def _spaced(tensor: Tensor) -> Tensor:
    return spaced_out(tensor) if tensor.dim() else tensor


def _copied(tensor: Tensor) -> Tensor:
    """A copy, so that the candidate cannot change the oracle's upstream gradient."""
    return tensor.clone()


def _negative_among_zeros(tensor: Tensor) -> Tensor:
    """Every second element is zero, the others are negative.

    The factor π/4 makes numbers that use all their bits, so a backward that rounds upstream gradients changes them.
    """
    flat = (-tensor.abs() * (math.pi / 4)).reshape(-1)
    flat[1::2] = 0
    return flat.view(tensor.shape)


def _tiny(context: CaseContext, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream gradients that make most gradients subnormal, and the largest one a little larger than subnormal."""
    largest = max(float(g.abs().amax()) for g in context.oracle.gradients.values() if g is not None and g.numel())
    exponent = math.floor(math.log2(_HEADROOM * torch.finfo(context.dtype).tiny / largest)) if largest > 0 else 0
    return {k: v * 2.0 ** min(0, exponent) for k, v in base.items()}


def _scaled(context: CaseContext, base: Mapping[str, Tensor]) -> list[Probe]:
    """Scaling by 2^k scales the gradients by 2^k, bit for bit if neither run overflows or loses bits."""
    gradients = {f"grad_{k}": v for k, v in context.result.gradients.items() if v is not None}
    oracle = context.oracle.tensors()
    known = {name: oracle[name] for name in gradients if name in oracle}
    room = [_room(v.double(), v.dtype) for v in base.values()]
    room += [_room(exact, gradients[name].dtype) for name, exact in known.items()]
    exponent = min(_SCALING, *room)
    exponent = exponent if exponent >= 1 else _DOWNWARDS
    factor = 2.0**exponent
    case = varied(context, upstream={k: v * factor for k, v in base.items()})
    words = f"scaled by 2^{exponent}"
    actual, expected = {}, {}
    for name, exact in known.items():
        limits = torch.finfo(gradients[name].dtype)
        size = exact.abs()
        lowest, highest = size * min(1.0, factor), size * max(1.0, factor)
        whole = (lowest >= 2 * limits.tiny) & (highest <= limits.max / 2)
        if bool(whole.any()):
            actual[name] = torch.where(whole, case.result.tensors()[name], 0)
            expected[name] = torch.where(whole, gradients[name] * factor, 0)
    exact_probes = [
        equality_probe(
            name, actual=actual[name], expected=tensor, law=f"gradients scale exactly by 2^{exponent}", context=words
        )
        for name, tensor in expected.items()
    ]
    if context.dtype != torch.float16:
        return exact_probes
    bounded = [
        bounded_probe(
            name,
            actual=actual[name],
            expected=tensor.double(),
            bound=partial(_bound_of_both, context, case, factor, name),
            context=words,
        )
        for name, tensor in expected.items()
    ]
    return [_by_standard(context.dtype, *pair) for pair in zip(exact_probes, bounded, strict=True)]


def _bound_of_both(context: CaseContext, case: CaseContext, factor: float, name: str, standard: str) -> ErrorBound:
    """The bound on the difference between the scaled run and ``factor`` times the plain run.

    Each run has its own errors: the smaller one may store subnormals where the larger one does not. Some elements may
    be left out, but the bias is that of all elements, because the others have it, too.
    """
    scaled, plain = case.bounds(standard)[name], context.bounds(standard)[name]
    exact = context.oracle.tensors()[name]
    rounding = plain.final_rounding(exact.reshape(-1)).view(exact.shape)
    squares = (plain.independent.double().square() + rounding.square()) * factor**2
    return replace(
        scaled,
        independent=(scaled.independent.double().square() + squares).sqrt(),
        coherent=scaled.coherent.double() + plain.coherent.double() * factor,
        bias=abs(scaled.bias) + abs(plain.bias),
    )


def _room(tensor: Tensor, dtype: torch.dtype) -> int:
    """The largest k for which ``tensor`` times 2^k does not overflow ``dtype``, with headroom."""
    largest = float(tensor.abs().amax()) if tensor.numel() else 0.0
    if largest == 0.0:
        return _SCALING
    # Two logarithms, because float64's largest number divided by a small one overflows.
    return math.floor(math.log2(torch.finfo(dtype).max / _HEADROOM) - math.log2(largest))


def _by_standard(dtype: torch.dtype, exact: Probe, bounded: Probe) -> Probe:
    """``exact`` for a standard that requires exact scaling, and otherwise ``bounded``."""

    def measure(tensor: Tensor, standard: str) -> tuple[Measurement, ...]:
        chosen = exact if standard_named(standard).scales_exactly(dtype) else bounded
        return chosen.measure(tensor, standard)

    return replace(exact, measure=measure)


CHECK = Check(
    "upstream",
    "gradients are right for upstream gradients that are expanded, negative, zero in places, scaled, or tiny",
    _probes,
)
