"""Gradients do not depend on which inputs require them: every subset gets the gradients of the full run, and no others.

Two defects do not show as long as every input requires a gradient: a backward that returns its gradients in the wrong
order, and one that computes a gradient from the buffer of another gradient that was not asked for.
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

# Up to this number of inputs all proper subsets are tried, at most 15.
_FEW = 4


def proper_subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """For few names, every subset except the full one; for many names, the empty one, single names, and all but one."""
    sizes = range(len(names)) if len(names) <= _FEW else (0, 1, len(names) - 1)
    return list(chain.from_iterable(combinations(names, size) for size in sizes))


def _probes(context: CaseContext) -> list[Probe]:
    if not context.upstream:
        raise Inapplicable("the reference has no differentiable outputs")
    full = context.result.gradients
    probes = []
    for subset in proper_subsets(context.differentiable):
        words = f"requiring {', '.join(subset) or 'none'}"
        # An output that does not depend on these inputs does not require a gradient now.
        carrying = context.evaluate_reference(differentiable=subset).differentiable
        upstream = {k: v for k, v in context.upstream.items() if k in carrying}
        part = context.evaluate(Run(context.inputs, context.parameters, upstream), differentiable=subset)
        if not subset and part.differentiable:
            raise CandidateError(
                f"returned {', '.join(part.differentiable)} with requires_grad, although no input has it"
            )
        for name in subset:
            if full[name] is not None and part.gradients.get(name) is None:
                raise CandidateError(
                    f"gave no gradient for {name!r} with requires_grad on {', '.join(subset)} only, but gave one with "
                    f"requires_grad on all inputs"
                )
        named = {f"grad_{k}": v for k, v in full.items() if k in subset and v is not None}
        kept = {
            k: v for k, v in context.result.tensors().items() if k in (carrying if subset else context.result.outputs)
        }
        probes += held_to_bounds(context, actual=part.tensors(), expected={**kept, **named}, scale=2.0, where=words)
    return probes


CHECK = Check(
    "gradient_subsets", "every input gets the same gradient, whichever other inputs require gradients", _probes
)
