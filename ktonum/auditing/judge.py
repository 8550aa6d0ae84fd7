"""From a check and a case to a verdict."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

from torch import Tensor

from ktonum.case.context import CaseContext
from ktonum.case.out_of_memory import is_out_of_memory
from ktonum.checks import Check, Inapplicable, checks_for
from ktonum.declare.cases import Case
from ktonum.declare.op import Op
from ktonum.errors import CandidateError, InputError, UsageError
from ktonum.locate.localise import Surroundings, localise
from ktonum.measure.probe import Probe
from ktonum.power.planting import power_of
from ktonum.results import STANDARDS, CheckResult, Localisation, Measurement, Verdict

__all__ = ["check_named", "run_check"]


def check_named(op: Op, case: Case, name: str) -> Check:
    """The check called ``name`` among those that apply to the case.

    Raises:
        UsageError: There is none.
    """
    found = {c.name: c for c in checks_for(op, case)}
    if name not in found:
        raise UsageError(f"no check {name!r} applies to {case.name}: use {', '.join(found)}")
    return found[name]


def run_check(check: Check, context: CaseContext, standard: str = "precise") -> CheckResult:
    """Put one question to one case. Whatever the candidate does, a result comes back.

    Args:
        check: The question.
        context: The case; reuse it for the case's other checks, for it keeps what they share.
        standard: ``precise`` or ``eager``.
    """
    if standard not in STANDARDS:
        raise UsageError(f"unknown standard {standard!r}: use {' or '.join(STANDARDS)}")
    started = time.perf_counter()
    result = _judge(check, context, standard)
    # A result's own time; nothing is decided by it.
    fields = {**vars(result), "standard": standard, "seconds": time.perf_counter() - started}
    return CheckResult(**fields)


def _judge(check: Check, context: CaseContext, standard: str) -> CheckResult:
    name = context.case.name

    def result(verdict: Verdict, reason: str, details: str = "") -> CheckResult:
        return CheckResult(name, check.name, verdict, reason=reason, details=details)

    try:
        if check.judge is not None:
            return check.judge(context)
        return _measure(check, context, standard)
    except Inapplicable as reason:
        return result(Verdict.INCONCLUSIVE, str(reason))
    except UsageError as reason:
        return result(Verdict.INCONCLUSIVE, f"the candidate cannot run this case: {reason}")
    except CandidateError as error:
        first, _, rest = str(error).partition("\n")
        return result(Verdict.ERROR, f"the candidate {first}", rest)
    except InputError as error:
        return result(Verdict.ERROR, f"the candidate refused the case: {error}")
    except Exception as error:
        if is_out_of_memory(error):
            return result(Verdict.INCONCLUSIVE, f"out of device memory while checking: {str(error).splitlines()[0]}")
        return result(Verdict.ERROR, f"{type(error).__name__}: {error}", traceback.format_exc())


def _measure(check: Check, context: CaseContext, standard: str) -> CheckResult:
    assert check.probes is not None  # a check has probes or judges for itself
    probes = check.probes(context)
    case = context.case.name
    if not probes:
        return CheckResult(case, check.name, Verdict.INCONCLUSIVE, reason="the candidate has nothing to measure here")
    by_probe = {s: [p.measure(p.actual, s) for p in probes] for s in STANDARDS}
    measurements: dict[str, list[Measurement]] = {s: [m for found in by_probe[s] for m in found] for s in STANDARDS}
    meets = tuple(s for s in STANDARDS if all(m.within for m in measurements[s]))
    decisive = tuple(measurements[standard])
    if standard in meets:
        power = tuple(p for probe in probes for p in power_of(probe, standard))
        if not any(p.size is not None for p in power):
            reason = "vacuous: no planted defect, up to 400 %, was flagged"
            return CheckResult(case, check.name, Verdict.PASS, decisive, power, reason, meets=meets)
        return CheckResult(case, check.name, Verdict.PASS, decisive, power, meets=meets)
    worst = max((m for m in decisive if not m.within), key=lambda m: m.use)
    at = f" at {worst.where}" if worst.where else ""
    reason = f"{worst.name} = {worst.value:.3g} exceeds {worst.bound:.3g} ({worst.bound_source}){at}"
    places = _localised(context, list(zip(probes, by_probe[standard], strict=True)), standard)
    return CheckResult(case, check.name, Verdict.FAIL, decisive, (), reason, meets=meets, localisations=places)


def _localised(
    context: CaseContext, measured: Sequence[tuple[Probe, Sequence[Measurement]]], standard: str
) -> tuple[Localisation, ...]:
    """Where each failing tensor is wrong, the worst first."""
    uses = [(max((m.use for m in found if not m.within), default=0.0), probe) for probe, found in measured]
    failing = sorted((pair for pair in uses if pair[0] > 0), key=lambda pair: -pair[0])

    def surroundings() -> Surroundings:
        upstream = {f"upstream_{k}": float(v) for k, v in context.upstream.items() if v.numel() == 1}
        inputs = {k: v for k, v in context.inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        constants = {**context.parameters, **upstream}
        return Surroundings(context.case.point.dims, constants, {**inputs, **context.oracle.tensors()})

    return tuple(localise(probe, standard, surroundings) for _, probe in failing)
