"""Which errors grew beyond chance from one audit to the next, and which shrank: rank tests over cases.

Each case gives one number, and cases are independent: they have seeds of their own. A case's numbers for different
tensors, measures and checks are not, so they are averaged before anything is tested, never counted as more cases.

Two questions are asked, each with a stated probability that any of its answers is a false alarm, and Holm's correction
over its groups:

- of the outputs, and of the gradients, of each dtype and of all: few groups, so that ten cases suffice. A change counts
  in units of its tensor's and measure's usual change, else what is mostly chance, such as one number's, would
  hide what is steady, such as the norm of many. That unit knows no signs, so the test remains exact;
- of each tensor and measure alone, in each dtype and in all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ktonum.gate.pairing import Change
from ktonum.gate.signed_rank import holm, signed_rank_p

__all__ = ["EVERY", "FALSE_ALARM", "Drift", "Question", "drifts", "enough_cases", "times"]

#: Probability that one question raises a false alarm, where errors are drawn anew from an unchanged distribution.
FALSE_ALARM = 0.01
# An error's change counts for no more than this many times the usual one of its tensor and measure.
_MOST = 2.0
# A question about all dtypes.
EVERY = "every dtype"
# A change of a number below this is its last digits'.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Drift:
    """A group of errors that changed beyond chance.

    Attributes:
        what: ``outputs``, ``gradients``, or a tensor and a measure, e.g. ``grad_weight/relative_norm``.
        dtype: The dtype's name, or ``every dtype``.
        cases: How many cases have changed numbers; ``larger`` of them have larger errors now.
        ratio: What is now over what was before, the median over cases.
        p: Adjusted for the groups tested beside it.
        bound_ratio: The same of the bounds.
        from_reference: Whether the bounds are measured on the reference.
        kind: ``outputs`` or ``gradients``.
        steepest: Of ``outputs`` or ``gradients``, the tensors and measures that changed most surely.
    """

    what: str
    dtype: str
    cases: int
    larger: int
    ratio: float
    p: float
    bound_ratio: float
    from_reference: bool
    kind: str
    steepest: tuple[str, ...] = ()

    @property
    def together(self) -> bool:
        """Whether the group is of all outputs or all gradients."""
        return self.what == self.kind


@dataclass(frozen=True)
class Question:
    """What of a change is asked: ``of`` it, and whether it is ``larger`` now (else smaller)."""

    of: Callable[[Change], float]
    larger: bool = True

    def signed(self, change: Change) -> float:
        """Positive for what is asked."""
        value = self.of(change)
        return 0.0 if abs(value) < _NOTHING else (value if self.larger else -value)


def enough_cases(found: Sequence[Change], false_alarm: float = FALSE_ALARM) -> bool:
    """Whether growth in every case that changed would be found; n cases agree by chance with probability 2⁻ⁿ."""
    by_kind: dict[tuple[str, str], set[str]] = {}
    for c in found:
        if abs(c.use) >= _NOTHING:
            by_kind.setdefault((c.kind, c.dtype), set()).add(c.case)
    every = {kind: {case for (k, _), cases in by_kind.items() if k == kind for case in cases} for kind, _ in by_kind}
    groups = len(by_kind) + (len(every) if len({dtype for _, dtype in by_kind}) > 1 else 0)
    return all(groups * 2.0 ** -len(cases) <= false_alarm for cases in every.values())


def drifts(found: Sequence[Change], question: Question, false_alarm: float = FALSE_ALARM) -> tuple[Drift, ...]:
    """Groups of errors that changed beyond chance, the surest first.

    Args:
        found: What became of each error.
        question: Which change is asked for.
        false_alarm: Probability that any group is returned by chance, for groups of tensors and for single ones each.
    """
    by_measure: dict[tuple[str, str, str], list[Change]] = {}
    for c in found:
        by_measure.setdefault((c.tensor, c.measure, c.dtype), []).append(c)
    means = {key: _by_case(group, question.signed) for key, group in by_measure.items()}
    together = _together(by_measure, means)
    alone = {(f"{t}/{m}", d): (means[t, m, d], group) for (t, m, d), group in by_measure.items()}
    for tensor, measure in dict.fromkeys((t, m) for t, m, _ in by_measure):
        of_all = [(means[key], group) for key, group in by_measure.items() if key[:2] == (tensor, measure)]
        if len(of_all) > 1:
            merged = {case: value for values, _ in of_all for case, value in values.items()}
            alone[f"{tensor}/{measure}", EVERY] = (merged, [c for _, group in of_all for c in group])
    result = []
    for groups in (together, alone):
        p_values = holm([signed_rank_p(list(values.values())) for values, _ in groups.values()])
        for ((what, dtype), (values, group)), p in zip(groups.items(), p_values, strict=True):
            if p <= false_alarm:
                steepest = _steepest(group, question) if groups is together else ()
                result.append(_drift(what, dtype, values, group, question, p, steepest))
    return tuple(sorted(result, key=lambda d: d.p))


Groups = dict[tuple[str, str], tuple[Mapping[str, float], list[Change]]]


def _by_case(group: Iterable[Change], value: Callable[[Change], float]) -> dict[str, float]:
    cases: dict[str, list[float]] = {}
    for change in group:
        cases.setdefault(change.case, []).append(value(change))
    return {case: statistics.fmean(values) for case, values in cases.items()}


def _together(
    by_measure: Mapping[tuple[str, str, str], list[Change]], means: Mapping[tuple[str, str, str], Mapping[str, float]]
) -> Groups:
    """Outputs and gradients of each dtype: for each case the mean over tensors and measures, in their usual change."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    groups: Groups = {}
    for key, cases in means.items():
        sizes = [abs(v) for v in cases.values() if v != 0]
        if not sizes:
            continue
        usual = statistics.median(sizes)
        kind = (by_measure[key][0].kind, key[2])
        for case, value in cases.items():
            scaled = max(-_MOST, min(_MOST, value / usual))
            for group in (kind, (kind[0], EVERY)):
                values.setdefault(group, {}).setdefault(case, []).append(scaled)
        for group in (kind, (kind[0], EVERY)):
            groups.setdefault(group, ({}, []))[1].extend(by_measure[key])
    if len({dtype for _, dtype in groups}) == 2:  # one, and every
        groups = {kind: group for kind, group in groups.items() if kind[1] != EVERY}
    return {
        kind: ({case: statistics.fmean(v) for case, v in values[kind].items()}, group)
        for kind, (_, group) in groups.items()
    }


def _steepest(group: Sequence[Change], question: Question, most: int = 2) -> tuple[str, ...]:
    """The tensors and measures of a group with the smallest p-values of their own, with their ratios."""
    named: dict[str, list[Change]] = {}
    for c in group:
        named.setdefault(f"{c.tensor}/{c.measure}", []).append(c)
    means = {name: _by_case(changes, question.signed) for name, changes in named.items()}
    order = sorted((signed_rank_p(list(values.values())), name) for name, values in means.items())
    ratios = {name: _ratio(_by_case(named[name], question.of).values()) for _, name in order[:most]}
    return tuple(f"{name} {times(ratio)}" for name, ratio in ratios.items())


def _drift(
    what: str,
    dtype: str,
    values: Mapping[str, float],
    group: Sequence[Change],
    question: Question,
    p: float,
    steepest: tuple[str, ...],
) -> Drift:
    changed = [v for v in values.values() if v != 0]
    positive = sum(v > 0 for v in changed)
    return Drift(
        what=what,
        dtype=dtype,
        cases=len(changed),
        larger=positive if question.larger else len(changed) - positive,
        ratio=_ratio(_by_case(group, question.of).values()),
        p=p,
        bound_ratio=_ratio(_by_case(group, lambda c: c.bound).values()),
        from_reference=all(c.from_reference for c in group),
        kind=group[0].kind,
        steepest=steepest,
    )


def times(ratio: float) -> str:
    """A ratio in words."""
    return "× 1000 or more" if ratio > 999 else "× 1/1000 or less" if ratio < 1 / 999 else f"× {ratio:.3g}"


def _ratio(logarithms: Iterable[float]) -> float:
    return math.exp(statistics.median(logarithms))
