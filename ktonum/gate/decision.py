"""Compares an audit with its baseline: what is new, what grew, and what caused it."""

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

# Differences of these are another device; a count of devices or a driver's version is not.
_DEVICE = ("device name", "device capability", "device multiprocessors")


class Attribution(StrEnum):
    """What caused a change for the worse, as far as two audits tell."""

    KERNEL_WORSE = "kernel worse"
    REFERENCE_BETTER = "reference better"
    BOUND_TIGHTER = "bound tighter"
    DEVICE_NEW = "device new"
    POWER_LOST = "power lost"
    CASE_NEW = "case new"


@dataclass(frozen=True)
class Failure:
    """A result that fails now and did not in the baseline; ``before`` is its verdict there, empty for a new one."""

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
    """What an audit amounts to beside its baseline.

    Attributes:
        failures: New failures.
        growths: What grew beyond chance, the surest first.
        vanished: Results that the baseline has and the audit lacks.
        undecided: Results that are INCONCLUSIVE now and were not.
        fixed: Results that failed in the baseline and do not now.
        standards: For each lost standard that did not decide, and each cause, the number of results.
        shrunk: Errors that shrank beyond chance.
        new: Results that the baseline lacks.
        known: Failures in both.
        environment: Versions, device and settings that differ: before and now by name.
        device_new: Whether the device is another.
        compared: How many results both have; ``cases`` of how many cases.
        changed: How many of the errors in both have changed, ``errors`` how many there are.
        enough_cases: Whether there are enough changed cases to tell growth from chance.
        unfinished: How many planned results the current audit lacks.
        strict: Whether what needs a new baseline fails: growth on a new device, and what became INCONCLUSIVE.
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
        """Growth that fails the gate: the kernel's, and with ``strict`` a new device's."""
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
        current: The one to decide about.
        false_alarm: See `ktonum.gate.grown_errors`.
        strict: See `Gate`.

    Raises:
        UsageError: They audit different ops, or hold them to different standards.
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
    """A report does not say which tensor misses a standard that did not decide. It does say whether an error grew."""
    lost: Counter[tuple[str, Attribution]] = Counter()
    for pair in pairs:
        for standard in set(pair.before.meets) - set(pair.now.meets) - {pair.now.standard}:
            if pair.now.measurements:
                blamed = Attribution.KERNEL_WORSE if any_grew(pair) else _bound(_follows_plain(standard))
                lost[standard, Attribution.DEVICE_NEW if device_new else blamed] += 1
    return dict(lost)


def _follows_plain(standard: str) -> bool:
    """Whether the bounds of a standard follow plain PyTorch's error."""
    from ktonum.bounds import standard_named  # with it comes torch, which a gate needs only here

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
    """The cause where an error fails or uses more of its bound, but did not grow."""
    return Attribution.REFERENCE_BETTER if from_reference else Attribution.BOUND_TIGHTER


def _growths(found: Sequence[Change], false_alarm: float, device_new: bool) -> tuple[Growth, ...]:
    """What grew: errors, and where bounds changed as well the share of them that errors use."""
    own = Attribution.DEVICE_NEW if device_new else Attribution.KERNEL_WORSE
    grown = drifts(found, Question(lambda c: c.error), false_alarm)
    growths = [Growth(d, own) for d in _covered(grown)]
    if any(c.bound != 0 for c in found):
        known = {(d.what, d.dtype) for d in grown}
        for d in _covered(drifts(found, Question(lambda c: c.use), false_alarm)):
            if (d.what, d.dtype) not in known:
                # The share is error / bound: which of the two changed more?
                by_bound = 1 / d.bound_ratio > d.ratio * d.bound_ratio
                growths.append(Growth(d, _bound(d.from_reference) if by_bound else own))
    return tuple(growths)


def _covered(found: Sequence[Drift]) -> tuple[Drift, ...]:
    """Without what another group says already: one dtype if every dtype changed, all gradients if one is named."""
    named = {(d.kind, d.dtype) for d in found if not d.together}
    everywhere = {d.what for d in found if d.dtype == EVERY}
    return tuple(
        d
        for d in found
        if (d.dtype == EVERY or d.what not in everywhere) and not (d.together and (d.kind, d.dtype) in named)
    )
