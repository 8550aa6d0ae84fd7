"""Gradients do not depend on which inputs require them: every subset gives what the full run gives, and no more.

A backward that returns its gradients in the wrong order, or computes one from the buffer of another that was not asked
for, is right as long as every input requires a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable, held_to_bounds
from ktonum.declare.evaluation import Run
from ktonum.errors import CandidateError
from ktonum.measure.probe import Probe

__all__ = ["CHECK", "proper_subsets"]

# Up to this many inputs all subsets are tried, 15 at most.
_FEW = 4


def proper_subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset of few names but the full one; of many names none, each one alone, and all but one."""
    sizes = range(len(names)) if len(names) <= _FEW else (0, 1, len(names) - 1)
    return list(chain.from_iterable(combinations(names, size) for size in sizes))


def _probes(context: CaseContext) -> list[Probe]:
    if not context.upstream:
        raise Inapplicable("the reference has no differentiable outputs")
    full = context.result.gradients
    probes = []
    for subset in proper_subsets(context.differentiable):
        words = f"requiring {', '.join(subset) or 'none'}"
        # An output that does not depend on these inputs carries no gradient now.
        carrying = context.evaluate_reference(differentiable=subset).differentiable
        upstream = {k: v for k, v in context.upstream.items() if k in carrying}
        part = context.evaluate(Run(context.inputs, context.parameters, upstream), differentiable=subset)
        if not subset and part.differentiable:
            raise CandidateError(f"gave {', '.join(part.differentiable)} a gradient although no input requires one")
        for name in subset:
            if full[name] is not None and part.gradients.get(name) is None:
                raise CandidateError(f"gave no gradient for {name!r} {words}, and one when every input requires one")
        named = {f"grad_{k}": v for k, v in full.items() if k in subset and v is not None}
        kept = {
            k: v for k, v in context.result.tensors().items() if k in (carrying if subset else context.result.outputs)
        }
        probes += held_to_bounds(context, actual=part.tensors(), expected={**kept, **named}, scale=2.0, where=words)
    return probes


CHECK = Check("gradient_subsets", "every subset of inputs that require gradients gets those of the full run", _probes)
