"""Float64 gradients against finite differences of the candidate itself, without the reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable
from ktonum.declare.cases import Case, seed_of
from ktonum.declare.evaluation import named_outputs
from ktonum.declare.op import Op
from ktonum.gradient_check.gradcheck import gradcheck
from ktonum.results import CheckResult

__all__ = ["CHECK"]


def _judge(context: CaseContext) -> CheckResult:
    names = context.differentiable
    if not context.upstream:
        raise Inapplicable("the reference has no differentiable outputs")
    strange = [
        name for name in context.upstream if (t := context.oracle.outputs[name]) is None or not bool(t.isfinite().all())
    ]
    if strange:
        raise Inapplicable(f"the reference's {', '.join(strange)} is not finite here, so it has no finite differences")
    candidate = context.candidate

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        # Copies, because other runs of the case read these tensors. gradcheck itself copies the differentiated ones.
        others = {k: v.clone() if isinstance(v, Tensor) else v for k, v in context.inputs.items() if k not in names}
        outputs = named_outputs(candidate(**others, **dict(zip(names, tensors, strict=True))))
        return tuple(t for name in context.upstream if (t := outputs.get(name)) is not None)

    leaves: list[Any] = [context.inputs[name].detach().requires_grad_() for name in names]
    seed = seed_of(context.case.name) % 2**31
    result = gradcheck(function, leaves, seed=seed, raise_exception=False, names=names)
    return result.to_check_result(case=context.case.name, check="gradcheck")


def _applies(op: Op, case: Case) -> bool:
    return case.dtype == "fp64"


CHECK = Check(
    "gradcheck",
    "float64 gradients agree with extrapolated finite differences of the candidate",
    judge=_judge,
    applies=_applies,
)
