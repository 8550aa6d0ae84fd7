"""Forward and backward do not change inputs and upstream gradients."""

from __future__ import annotations

from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check
from ktonum.declare.evaluation import Run
from ktonum.measure.probe import Probe, equality_probe

__all__ = ["CHECK"]


def _probes(context: CaseContext) -> list[Probe]:
    outputs = context.result.tensors()
    # In the outputs' dtypes: otherwise autograd passes on a converted copy, and changes of that copy do not show here.
    sent = {k: v.to(outputs[k].dtype) for k, v in context.upstream.items()}
    before = {k: v for k, v in {**context.inputs, **_named_upstream(sent)}.items() if isinstance(v, Tensor)}
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in context.inputs.items()}
    upstream = {k: v.clone() for k, v in sent.items()}
    context.evaluate(Run(given, context.parameters, upstream))
    after = {**given, **_named_upstream(upstream)}
    return [
        equality_probe(name, actual=after[name], expected=tensor, law="inputs and upstream gradients stay unchanged")
        for name, tensor in before.items()
    ]


def _named_upstream(upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"upstream_{name}": tensor for name, tensor in upstream.items()}


CHECK = Check("unmodified", "inputs and upstream gradients stay unchanged, bit for bit", _probes)
