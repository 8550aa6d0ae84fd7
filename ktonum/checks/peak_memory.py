"""The device memory of a forward and backward is compared with the bound that the op declares."""

from __future__ import annotations

import torch

from ktonum.case.context import CaseContext
from ktonum.checks.check import Check, Inapplicable
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.results import STANDARDS, BoundKind, BoundSource, CheckResult, Measurement, Power, Verdict

__all__ = ["CHECK"]


def _judge(context: CaseContext) -> CheckResult:
    declared, case = context.op.peak_memory, context.case
    assert declared is not None  # see `_applies`
    if case.device != "cuda":
        raise Inapplicable(f"memory is counted on CUDA devices only, and this case runs on {case.device}")
    granted = float(declared(case.point.dims, case.point.parameters, case.dtype))
    result = _held(context, float(_peak(context)), granted)
    if result.verdict is not Verdict.PASS:
        return result
    # Ask the same about one byte more than is declared.
    caught = _held(context, granted + 1.0, granted).verdict is Verdict.FAIL
    power = Power("", "a byte more than granted", "", 1.0 if caught else None)
    return CheckResult(case.name, "peak_memory", Verdict.PASS, result.measurements, (power,), meets=STANDARDS)


def _peak(context: CaseContext) -> int:
    """The largest number of bytes in use during a run, without those that were in use before it."""
    # The first run compiles kernels and fills caches, so it takes more memory than later ones.
    _ = context.result
    torch.cuda.synchronize(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    before = torch.cuda.memory_allocated(context.device)
    context.evaluate()
    torch.cuda.synchronize(context.device)
    # `evaluate` runs the candidate on copies of the inputs. The memory of these copies does not count.
    copies = sum(t.numel() * t.element_size() for t in context.inputs.values() if isinstance(t, torch.Tensor))
    return max(0, torch.cuda.max_memory_allocated(context.device) - before - copies)


def _held(context: CaseContext, peak: float, granted: float) -> CheckResult:
    measurement = Measurement("", "peak_memory", peak, granted, "bytes", BoundSource(BoundKind.DECLARED))
    verdict = Verdict.PASS if measurement.within else Verdict.FAIL
    reason = (
        ""
        if measurement.within
        else f"a run takes {peak:.4g} bytes besides its inputs; the op declares {granted:.4g} bytes"
    )
    return CheckResult(context.case.name, "peak_memory", verdict, (measurement,), reason=reason)


def _applies(op: Op, case: Case) -> bool:
    return op.peak_memory is not None and case.device == "cuda"


CHECK = Check(
    "peak_memory", "a run takes at most the device memory that the op declares", judge=_judge, applies=_applies
)
