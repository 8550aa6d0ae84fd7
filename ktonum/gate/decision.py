"""Compares an audit with its baseline: new failures, errors that grew, and the cause of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ktonum.gate.grown_errors import EVERY, FALSE_ALARM, Drift, Question, drifts, enough_cases
from ktonum.gate.pairing import Change, Pair, any_grew, changes, pair_results
from ktonum.gate.report_reading import check_comparable, described
from ktonum.results import CheckResult, Report, Verdict

__all__ = ["Attribution", "Failure", "Gate", "Growth", "hold_against"]

# A difference in one of these means another device. The number of devices and the CUDA version do not count.
_DEVICE = ("device name", "device capability", "device multiprocessors")


class Attribution(StrEnum):
    """The cause of a change for the worse, as far as two audits can show it."""

    KERNEL_WORSE = "kernel worse"
    REFERENCE_BETTER = "reference better"
    BOUND_TIGHTER = "bound tighter"
    DEVICE_NEW = "device new"
    POWER_LOST = "power lost"
    CASE_NEW = "case new"


@dataclass(frozen=True)
class Failure:
    """A result that fails now and did not fail in the baseline. ``before`` is its verdict there; empty if it is new."""

    result: CheckResult
    before: str
    attribution: Attribution


@dataclass(frozen=True)
class Growth:
    """Errors that use more of their bounds than in the baseline, beyond chance."""

    drift: Drift
    attribution: Attribution


@dataclass(frozen=True)
class Gate:
    """The differences between an audit and its baseline.

    Attributes:
        failures: New failures.
        growths: Errors that grew beyond chance, the smallest p-value first.
        vanished: Results that the baseline has and the audit does not have.
        undecided: Results that are INCONCLUSIVE now and were not in the baseline.
        fixed: Results that failed in the baseline and neither fail nor are INCONCLUSIVE now.
        standards: The number of results that no longer meet a standard which does not decide, by standard and cause.
        shrunk: Errors that shrank beyond chance.
        new: Results that the baseline does not have.
        known: Results that fail in both audits.
        environment: Versions, device and settings that differ: their values before and now, by name.
        device_new: Whether the two audits used different devices.
        compared: The number of results that both audits have.
        cases: The number of cases of these results.
        changed: The number of errors that differ between the audits.
        errors: The number of errors that both audits have.
        enough_cases: Whether there are enough changed cases to tell growth from chance.
        unfinished: The number of planned results that the current audit does not have.
        strict: Whether growth on a new device and results that became INCONCLUSIVE fail the gate, too.
    """

    failures: tuple[Failure, ...]
    growths: tuple[Growth, ...]
    vanished: tuple[CheckResult, ...]
    undecided: tuple[CheckResult, ...]
    fixed: tuple[CheckResult, ...]
    standards: Mapping[tuple[str, Attribution], int]
    shrunk: tuple[Drift, ...]
    new: tuple[CheckResult, ...]
    known: tuple[CheckResult, ...]
    environment: Mapping[str, tuple[str, str]]
    device_new: bool
    compared: int
    cases: int
    changed: int
    errors: int
    enough_cases: bool
    unfinished: int = 0
    strict: bool = False

    @property
    def worse(self) -> tuple[Growth, ...]:
        """Growth that fails the gate: the kernel's, and with ``strict`` also a new device's."""
        failing = {Attribution.KERNEL_WORSE, *([Attribution.DEVICE_NEW] if self.strict else [])}
        return tuple(g for g in self.growths if g.attribution in failing)

    @property
    def passed(self) -> bool:
        """Whether nothing is worse than in the baseline."""
        lost = self.vanished or (self.strict and self.undecided)
        return not (self.failures or self.worse or lost or self.unfinished)


def hold_against(*, baseline: Report, current: Report, false_alarm: float = FALSE_ALARM, strict: bool = False) -> Gate:
    """Compare an audit with an earlier one.

    Args:
        baseline: The earlier audit.
        current: The audit to decide about.
        false_alarm: See `ktonum.gate.grown_errors`.
        strict: See `Gate`.

    Raises:
        UsageError: The two audits have different ops or different standards.
    """
    check_comparable(baseline, current)
    before, now = (described(report.environment) for report in (baseline, current))
    differing = {
        k: (before.get(k, "absent"), now.get(k, "absent"))
        for k in dict.fromkeys([*before, *now])
        if before.get(k) != now.get(k)
    }
    device_new = any(name in differing for name in _DEVICE)
    pairing = pair_results(baseline.results, current.results)
    found = list(changes(pairing.pairs))
    failures = [
        *(_failure(p, device_new) for p in pairing.pairs if p.now.failed and not p.before.failed),
        *(Failure(r, "", Attribution.CASE_NEW) for r in pairing.new if r.failed),
    ]
    audit = current.environment.get("audit")
    planned = audit.get("planned", 0) if isinstance(audit, Mapping) else 0
    return Gate(
        failures=tuple(failures),
        growths=_growths(found, false_alarm, device_new),
        vanished=pairing.vanished,
        undecided=tuple(p.now for p in pairing.pairs if _undecided(p.now) and not _undecided(p.before)),
        fixed=tuple(p.now for p in pairing.pairs if p.before.failed and not (p.now.failed or _undecided(p.now))),
        standards=_standards_lost(pairing.pairs, device_new),
        shrunk=_covered(drifts(found, Question(lambda c: c.error, larger=False), false_alarm)),
        new=pairing.new,
        known=tuple(p.now for p in pairing.pairs if p.before.failed and p.now.failed),
        environment=differing,
        device_new=device_new,
        compared=len(pairing.pairs),
        cases=len({p.now.case for p in pairing.pairs}),
        changed=sum(c.use != 0 for c in found),
        errors=len(found),
        enough_cases=enough_cases(found, false_alarm),
        unfinished=max(0, planned - len(current.results)) if isinstance(planned, int) else 0,
        strict=strict,
    )


def _undecided(result: CheckResult) -> bool:
    return result.verdict is Verdict.INCONCLUSIVE


def _standards_lost(pairs: Sequence[Pair], device_new: bool) -> dict[tuple[str, Attribution], int]:
    """A report does not say which tensor misses a standard that does not decide, but it says whether an error grew."""
    lost: Counter[tuple[str, Attribution]] = Counter()
    for pair in pairs:
        for standard in set(pair.before.meets) - set(pair.now.meets) - {pair.now.standard}:
            if pair.now.measurements:
                blamed = Attribution.KERNEL_WORSE if any_grew(pair) else _bound(_follows_plain(standard))
                lost[standard, Attribution.DEVICE_NEW if device_new else blamed] += 1
    return dict(lost)


def _follows_plain(standard: str) -> bool:
    """Whether the bounds of a standard follow plain PyTorch's error."""
    from ktonum.bounds import standard_named  # this imports torch, which a gate needs only here

    return standard_named(standard).as_plain


def _failure(pair: Pair, device_new: bool) -> Failure:
    now = pair.now
    if device_new:
        blamed = Attribution.DEVICE_NEW
    elif now.verdict is Verdict.ERROR:
        blamed = Attribution.KERNEL_WORSE
    elif now.vacuous:
        blamed = Attribution.POWER_LOST
    else:
        worst = max((m for m in now.measurements if not m.within), key=lambda m: m.use, default=None)
        known = changes([pair])
        mine = [c for c in known if worst is not None and (c.tensor, c.measure) == (worst.tensor, worst.measure)]
        grown = not mine or any(c.error > 0 for c in mine)
        blamed = Attribution.KERNEL_WORSE if grown else _bound(all(c.from_reference for c in mine))
    return Failure(now, pair.before.verdict.value, blamed)


def _bound(from_reference: bool) -> Attribution:
    """The cause if an error did not grow, but fails or is a larger share of its bound."""
    return Attribution.REFERENCE_BETTER if from_reference else Attribution.BOUND_TIGHTER


def _growths(found: Sequence[Change], false_alarm: float, device_new: bool) -> tuple[Growth, ...]:
    """Errors that grew. If bounds changed, also errors that grew as a share of their bounds."""
    own = Attribution.DEVICE_NEW if device_new else Attribution.KERNEL_WORSE
    grown = drifts(found, Question(lambda c: c.error), false_alarm)
    growths = [Growth(d, own) for d in _covered(grown)]
    if any(c.bound != 0 for c in found):
        known = {(d.what, d.dtype) for d in grown}
        for d in _covered(drifts(found, Question(lambda c: c.use), false_alarm)):
            if (d.what, d.dtype) not in known:
                # The share is error / bound. The cause is the one of the two that changed more.
                by_bound = 1 / d.bound_ratio > d.ratio * d.bound_ratio
                growths.append(Growth(d, _bound(d.from_reference) if by_bound else own))
    return tuple(growths)


def _covered(found: Sequence[Drift]) -> tuple[Drift, ...]:
    """Without groups that say nothing new: one dtype if all changed, and all gradients if single ones are named."""
    named = {(d.kind, d.dtype) for d in found if not d.together}
    everywhere = {d.what for d in found if d.dtype == EVERY}
    return tuple(
        d
        for d in found
        if (d.dtype == EVERY or d.what not in everywhere) and not (d.together and (d.kind, d.dtype) in named)
    )
