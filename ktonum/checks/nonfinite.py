"""NaN and infinities in the inputs show exactly where they show in the reference, or the candidate refuses them.

A softmax whose maximum ignores NaN hides it. A softmax that subtracts minus infinity from itself turns a masked logit
into NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.case.variants import varied
from ktonum.checks.check import Check, Inapplicable
from ktonum.declare.evaluation import Evaluation
from ktonum.errors import CandidateError, InputError
from ktonum.measure.probe import Probe, equality_probe

__all__ = ["CHECK"]

_KINDS = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
_INFINITIES = ("-inf", "inf")


def _probes(context: CaseContext) -> list[Probe]:
    floating = [k for k, v in context.inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    if not floating:
        raise Inapplicable("no input is a floating-point tensor with elements")
    # The two infinities take turns, because a run for each kind and input would take most of an audit's time.
    kinds = [(name, kind) for i, name in enumerate(floating) for kind in ("NaN", _INFINITIES[i % 2])]
    return [probe for name, kind in kinds for probe in _poisoned(context, name, kind)]


def _poisoned(context: CaseContext, name: str, kind: str) -> list[Probe]:
    """Poison in the middle element. If no output of the reference shows it, also in an element that an output shows."""
    words, count = f"{kind} in {name}", context.inputs[name].numel()
    case = _with(context, name, kind, count // 2)
    try:
        ignored = not _shows(case.oracle)
    except InputError:
        return _refused_by_the_reference(context, name, kind, words)
    if not ignored:
        return _as_in_the_reference(context, case, name, words, kind)
    probes = _as_in_the_reference(context, case, name, f"{words} that is ignored", kind)
    for place in (count - 1, 0, count // 4, 3 * count // 4):
        case = _with(context, name, kind, place)
        if _shows(case.oracle):
            return [*probes, *_as_in_the_reference(context, case, name, words, kind)]
    return probes


def _with(context: CaseContext, name: str, kind: str, place: int) -> CaseContext:
    """The case with the input's element at a flat index poisoned."""
    poisoned = context.inputs[name].clone(memory_format=torch.contiguous_format)
    poisoned.view(-1)[place] = _KINDS[kind]
    return varied(context, inputs={**context.inputs, name: poisoned})


def _shows(expected: Evaluation) -> bool:
    return any(t is not None and not bool(t.isfinite().all()) for t in expected.outputs.values())


def _refused_by_the_reference(context: CaseContext, name: str, kind: str, words: str) -> list[Probe]:
    """The reference refuses the poison, so it does not say where one element shows. NaN in all elements must show."""
    everywhere = torch.full_like(context.inputs[name], _KINDS[kind])
    actual = _unless_refused(varied(context, inputs={**context.inputs, name: everywhere}), name)
    if actual is None:
        return [_affirmation(name, words, "refusal_missing", True)]
    if kind != "NaN":
        return []
    shows = any(not bool(t.isfinite().all()) for t in actual.tensors().values())
    return [_affirmation(name, words, "trace_missing", shows)]


def _as_in_the_reference(context: CaseContext, poisoned: CaseContext, name: str, words: str, kind: str) -> list[Probe]:
    actual = _unless_refused(poisoned, name)
    if actual is None:
        return [_affirmation(name, words, "refusal_missing", True)]
    poisoned.expected()  # raises if outputs or gradients are missing
    shown = kind == "NaN" and _shows(poisoned.oracle)
    return list(_same_places(actual, poisoned.oracle, context.oracle.tensors() if shown else {}, words))


def _unless_refused(case: CaseContext, name: str) -> Evaluation | None:
    """The candidate's run; None if it refuses the input and names it."""
    try:
        return case.result
    except (InputError, CandidateError) as error:
        if re.search(rf"\b{re.escape(name)}\b", str(error).partition("\n")[0]) is None:
            raise
        return None


def _affirmation(name: str, words: str, measure: str, holds: bool) -> Probe:
    """A probe for the input ``name``: the measure is 0 if ``holds``, and else 1."""
    return equality_probe(
        name,
        actual=torch.tensor([holds]),
        expected=torch.tensor([True]),
        law="the input is refused, or NaN shows in the result",
        measure=measure,
        context=f"with {words}",
    )


def _same_places(actual: Evaluation, expected: Evaluation, clean: Mapping[str, Tensor], words: str) -> Iterator[Probe]:
    """Outputs must not be finite exactly where the reference's outputs are not. For an element of a gradient:

    - If the reference's is finite, the candidate's must be finite.
    - If the reference's is not finite, and ``clean``, the gradient without the poison, is not zero there, the
      candidate's must not be finite.
    - Otherwise the candidate's may be anything. The gradient of an ignored element is zero by definition, but NaN if it
      is computed as 0 · NaN.

    ``clean`` is empty if no output shows NaN, because a product of zero and NaN may be either. It is also empty for
    infinities, because their gradients are limits that one right formula reaches and another one turns into NaN.
    """
    found, wanted = actual.tensors(), expected.tensors()
    for name, tensor in found.items():
        if name not in wanted:
            continue
        here, there = ~tensor.isfinite(), ~wanted[name].to(tensor.dtype).isfinite()
        if name not in expected.outputs:
            promised = clean[name] != 0 if name in clean else torch.zeros_like(there)
            here = here | (there & ~promised)
        yield equality_probe(
            name,
            actual=here,
            expected=there,
            law="NaN and infinities are where the reference has them",
            measure="nonfinite_places",
            context=f"with {words}",
        )


CHECK = Check(
    "nonfinite",
    "NaN and infinities appear where the reference has them, or the candidate refuses the input and names it",
    _probes,
)
