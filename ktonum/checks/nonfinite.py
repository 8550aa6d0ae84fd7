"""NaN and infinities in the inputs show where they do in the reference, and nowhere else; or they are refused.

A softmax whose maximum drops NaN hides it; one that subtracts minus infinity from itself makes it of a masked logit.
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
        raise Inapplicable("no input has floating values")
    # The infinities take turns: a run for each kind and input would be most of an audit.
    kinds = [(name, kind) for i, name in enumerate(floating) for kind in ("NaN", _INFINITIES[i % 2])]
    return [probe for name, kind in kinds for probe in _poisoned(context, name, kind)]


def _poisoned(context: CaseContext, name: str, kind: str) -> list[Probe]:
    """The middle element poisoned; and where no output of the reference shows it, one that does as well."""
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
    """It does not say what one element does, which may be masked. Everywhere, NaN must show."""
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
    poisoned.expected()  # raises where the structure is wrong
    shown = kind == "NaN" and _shows(poisoned.oracle)
    return list(_same_places(actual, poisoned.oracle, context.oracle.tensors() if shown else {}, words))


def _unless_refused(case: CaseContext, name: str) -> Evaluation | None:
    """The candidate's run; None where it refuses the input by name."""
    try:
        return case.result
    except (InputError, CandidateError) as error:
        if re.search(rf"\b{re.escape(name)}\b", str(error).partition("\n")[0]) is None:
            raise
        return None


def _affirmation(name: str, words: str, measure: str, holds: bool) -> Probe:
    """Of the input ``name``; the measure is 1 where what should hold does not."""
    return equality_probe(
        name,
        actual=torch.tensor([holds]),
        expected=torch.tensor([True]),
        law="refused, or shown in the result",
        measure=measure,
        context=f"with {words}",
    )


def _same_places(actual: Evaluation, expected: Evaluation, clean: Mapping[str, Tensor], words: str) -> Iterator[Probe]:
    """Outputs are not finite where the reference's are not. Gradients, as far as the reference promises it:

    - Where its own is finite, the candidate's is.
    - Where it is not, and ``clean``, the gradient without the poison, is not zero, nor is the candidate's finite.
    - Elsewhere it may be anything: what is ignored has a gradient that is zero by definition, and NaN as 0 · NaN.

    ``clean`` is empty where no output shows NaN: products of zero and NaN are no one's promise. Nor are infinities:
    gradients of them are limits that one right formula reaches and another turns into NaN.
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
            law="the reference's places",
            measure="nonfinite_places",
            context=f"with {words}",
        )


CHECK = Check("nonfinite", "NaN and infinities show where the reference's do, or are refused by name", _probes)
