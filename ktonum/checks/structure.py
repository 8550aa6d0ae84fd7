"""Shapes, dtypes, devices and absent tensors are those of the reference in the dtype under audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable
from ktonum.results import STANDARDS, BoundKind, BoundSource, CheckResult, Measurement, Power, Verdict

__all__ = ["CHECK"]


def _judge(context: CaseContext) -> CheckResult:
    context.expected()  # outputs and gradients that are missing have messages of their own
    wanted, found = context.plain, context.result
    strange = _differences(actual=found.outputs, expected=wanted.outputs)
    for name, gradient in found.gradients.items():
        # Zeros instead of an absent gradient are right, although they cost memory.
        if gradient is not None and wanted.gradients.get(name) is None and bool(gradient.any()):
            strange.append(f"gave {name!r} a gradient that is not zero, but the reference gives it none")
    if strange:
        return _result(context, Verdict.FAIL, len(strange), reason=f"the candidate {'; '.join(strange)}")
    lacking = [k for k, v in wanted.outputs.items() if v is not None and found.outputs.get(k) is None]
    if lacking:
        raise Inapplicable(f"the candidate does not return {', '.join(lacking)}, but the reference does")
    return replace(_result(context, Verdict.PASS, 0), power=_power(wanted.outputs), meets=STANDARDS)


def _result(context: CaseContext, verdict: Verdict, differences: int, reason: str = "") -> CheckResult:
    source = BoundSource(BoundKind.EXACT, text="the reference's structure")
    measurement = Measurement("", "structure_differences", float(differences), 0.0, "differences", source)
    return CheckResult(context.case.name, "structure", verdict, (measurement,), reason=reason)


def _differences(*, actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> list[str]:
    """The differences of ``actual``, in words that continue "the candidate". Tensors that it lacks do not count."""
    found = []
    for name, tensor in actual.items():
        if tensor is None:
            continue
        wanted = expected.get(name)
        if wanted is None:
            found.append(f"returned {name!r}, which the reference does not return")
            continue
        for what, mine, theirs in (
            ("shape", tuple(tensor.shape), tuple(wanted.shape)),
            ("dtype", tensor.dtype, wanted.dtype),
            ("device", tensor.device, wanted.device),
        ):
            if mine != theirs:
                found.append(f"returned {name!r} with {what} {mine}, but the reference's {what} is {theirs}")
    return found


def _power(outputs: Mapping[str, Tensor | None]) -> tuple[Power, ...]:
    """Planted defects: each output in another shape and dtype, and an output that the reference does not return."""
    planted: list[tuple[str, dict[str, Tensor | None]]] = []
    for name, tensor in outputs.items():
        if tensor is None:
            planted.append(("an output too many", {name: torch.zeros(())}))
        else:
            planted.append(("another shape", {name: tensor.unsqueeze(0)}))
            other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
            planted.append(("another dtype", {name: tensor.to(other)}))
    return tuple(
        Power("", kind, "", 1.0 if _differences(actual=wrong, expected=outputs) else None) for kind, wrong in planted
    )


CHECK = Check("structure", "shapes, dtypes, devices and absent tensors are those of the reference", judge=_judge)
