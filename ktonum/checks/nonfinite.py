"""NaN and infinities in the inputs show where they do in the reference, and nowhere else; or they are refused.

A softmax whose maximum drops NaN hides it; one that subtracts minus infinity from itself makes it of a masked logit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ktonum.checks.check import Check, Inapplicable
from ktonum.context import CaseContext
from ktonum.errors import CandidateError, InputError
from ktonum.evaluation import Evaluation
from ktonum.probe import Probe, equality_probe

__all__ = ["CHECK"]

_KINDS = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
_INFINITIES = ("-inf", "inf")


def _probes(context: CaseContext) -> list[Probe]:
    floating = [k for k, v in context.inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    if not floating:
        raise Inapplicable("no input has floating values")
    # The infinities take turns: a run for each kind and input would be most of an audit.
    kinds = [(name, kind) for i, name in enumerate(floating) for kind in ("NaN", _INFINITIES[i % 2])]
    return [probe for name, kind in kinds for probe in _poisoned(context, name, kind)]


def _poisoned(context: CaseContext, name: str, kind: str) -> list[Probe]:
    words, value = f"{kind} in {name}", _KINDS[kind]
    case = context.varied(inputs=_with(context.inputs, name, value))
    try:
        expected: Evaluation | None = case.oracle
    except InputError:
        # The reference refuses, and does not say what one element does: it may be masked. Everywhere, NaN must show.
        expected = None
        case = context.varied(inputs={**context.inputs, name: torch.full_like(context.inputs[name], value)})
    try:
        actual = case.result
    except (InputError, CandidateError) as error:
        if re.search(rf"\b{re.escape(name)}\b", str(error).partition("\n")[0]) is None:
            raise
        return [_affirmation(f"refusal of {words}", True)]
    if expected is None:
        if kind != "NaN":
            return []
        shows = any(not bool(t.isfinite().all()) for t in actual.tensors().values())
        return [_affirmation(f"any trace of {words}", shows)]
    case.expected()  # raises where the structure is wrong
    return list(_same_places(actual, expected, words, both_ways=kind == "NaN"))


def _with(inputs: Mapping[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    """``inputs`` with ``value`` in the middle of the named one."""
    poisoned = inputs[name].clone(memory_format=torch.contiguous_format)
    poisoned.view(-1)[poisoned.numel() // 2] = value
    return {**inputs, name: poisoned}


def _affirmation(name: str, holds: bool) -> Probe:
    return equality_probe(
        name, actual=torch.tensor([holds]), expected=torch.tensor([True]), law="refused, or shown in the result"
    )


def _same_places(actual: Evaluation, expected: Evaluation, words: str, *, both_ways: bool) -> Iterator[Probe]:
    """Non-finite elements are those of the reference.

    Gradients of infinities are limits that one right formula reaches and another turns into NaN: where the reference's
    is finite it must be finite, elsewhere it may be anything. NaN stays NaN in any formula.
    """
    found, wanted = actual.tensors(), expected.tensors()
    for name, tensor in found.items():
        if name not in wanted:
            continue
        here, there = ~tensor.isfinite(), ~wanted[name].to(tensor.dtype).isfinite()
        if name not in expected.outputs and not both_ways:
            here = here | there
        yield equality_probe(
            f"places where {name} is not finite with {words}", actual=here, expected=there, law="the reference's places"
        )


CHECK = Check("nonfinite", "NaN and infinities show where the reference's do, or are refused by name", _probes)
