"""Runs a check on a case and decides the verdict."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

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
from ktonum.results import STANDARDS, Cause, CheckResult, Localisation, Measurement, Verdict

__all__ = ["check_named", "run_check"]

# The cause for a check that decides itself and does not give a cause.
_CAUSES = {Verdict.FAIL: Cause.BEYOND_BOUND, Verdict.INCONCLUSIVE: Cause.CANNOT_TELL}


def check_named(op: Op, case: Case, name: str) -> Check:
    """The check called ``name`` among those that apply to the case.

    Raises:
        UsageError: No check of this name applies to the case.
    """
    found = {c.name: c for c in checks_for(op, case)}
    if name not in found:
        raise UsageError(f"no check called {name!r} applies to {case.name}: use {', '.join(found)}")
    return found[name]


def run_check(check: Check, context: CaseContext, standard: str = "precise") -> CheckResult:
    """Run one check on one case. Exceptions of the candidate or the check become verdicts.

    Args:
        check: The check.
        context: The case. Use the same context for all checks of the case, because it keeps the runs that they share.
        standard: ``precise`` or ``eager``.
    """
    if standard not in STANDARDS:
        raise UsageError(f"unknown standard {standard!r}: use {' or '.join(STANDARDS)}")
    started = time.perf_counter()
    result = _judge(check, context, standard)
    # The time does not influence the verdict.
    seconds = time.perf_counter() - started
    cause = result.cause or _CAUSES.get(result.verdict)
    parts, question = context.case.parts, check.question
    return replace(result, standard=standard, seconds=seconds, cause=cause, parts=parts, question=question)


def _judge(check: Check, context: CaseContext, standard: str) -> CheckResult:
    name = context.case.name

    def undecided(cause: Cause, reason: str) -> CheckResult:
        return CheckResult(name, check.name, Verdict.INCONCLUSIVE, reason=reason, cause=cause)

    def error(cause: Cause, reason: str, details: str = "") -> CheckResult:
        return CheckResult(name, check.name, Verdict.ERROR, reason=reason, details=details, cause=cause)

    try:
        if check.judge is not None:
            return check.judge(context)
        return _measure(check, context, standard)
    except Inapplicable as reason:
        return undecided(Cause.CANNOT_TELL, str(reason))
    except UsageError as reason:
        return undecided(Cause.CANNOT_RUN, str(reason))
    except CandidateError as raised:
        first, _, rest = str(raised).partition("\n")
        return error(Cause.CANDIDATE_WRONG, first, rest)
    except InputError as refusal:
        return error(Cause.CANDIDATE_REFUSED, str(refusal))
    except Exception as raised:
        if is_out_of_memory(raised):
            return undecided(Cause.OUT_OF_MEMORY, str(raised).splitlines()[0])
        return error(Cause.CHECK_RAISED, f"{type(raised).__name__}: {raised}", traceback.format_exc())


def _measure(check: Check, context: CaseContext, standard: str) -> CheckResult:
    assert check.probes is not None  # a check has either `probes` or `judge`
    probes = check.probes(context)
    case = context.case.name
    if not probes:
        return CheckResult(case, check.name, Verdict.INCONCLUSIVE, cause=Cause.NOTHING_MEASURED)
    by_probe = {s: [p.measure(p.actual, s) for p in probes] for s in STANDARDS}
    measurements: dict[str, list[Measurement]] = {s: [m for found in by_probe[s] for m in found] for s in STANDARDS}
    meets = tuple(s for s in STANDARDS if all(m.within for m in measurements[s]))
    decisive = tuple(measurements[standard])
    if standard in meets:
        power = tuple(p for probe in probes for p in power_of(probe, standard))
        return CheckResult(case, check.name, Verdict.PASS, decisive, power, meets=meets)
    places = _localised(context, list(zip(probes, by_probe[standard], strict=True)), standard)
    return CheckResult(case, check.name, Verdict.FAIL, decisive, meets=meets, localisations=places)


def _localised(
    context: CaseContext, measured: Sequence[tuple[Probe, Sequence[Measurement]]], standard: str
) -> tuple[Localisation, ...]:
    """Where each failing tensor is wrong, and what its error looks like; the worst tensor first."""
    uses = [(max((m.use for m in found if not m.within), default=0.0), probe) for probe, found in measured]
    failing = sorted((pair for pair in uses if pair[0] > 0), key=lambda pair: -pair[0])

    def surroundings() -> Surroundings:
        upstream = {f"upstream_{k}": float(v) for k, v in context.upstream.items() if v.numel() == 1}
        inputs = {k: v for k, v in context.inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        constants = {**context.parameters, **upstream}
        return Surroundings(context.case.point.dims, constants, {**inputs, **context.oracle.tensors()})

    return tuple(localise(probe, standard, surroundings) for _, probe in failing)
