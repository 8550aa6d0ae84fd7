"""Finds errors that grew beyond chance from one audit to the next, and errors that shrank, by rank tests over cases.

Each case gives one number. Cases are independent, because each has its own seed. The numbers of one case for different
tensors, measures and checks depend on each other. Therefore they are averaged before the test, and do not count as more
cases.

There are two questions. For each, the probability of any false alarm is given, with Holm's correction over its groups:

- Did all outputs together, or all gradients together, change, in one dtype or in all? These are few groups, so ten
  cases are enough. Each change is divided by the usual change of its tensor and measure. Otherwise the error of one
  number, which is mostly chance, would hide a steady error, such as the norm of many numbers. The usual change does
  not depend on signs, so the test stays exact.
- Did a single tensor and measure change, in one dtype or in all?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ktonum.gate.pairing import Change
from ktonum.gate.signed_rank import holm, signed_rank_p

__all__ = ["EVERY", "FALSE_ALARM", "Drift", "Question", "drifts", "enough_cases", "times"]

#: Probability that one question raises a false alarm if errors are drawn again from the same distribution.
FALSE_ALARM = 0.01
# The change of an error counts as at most this many times the usual change of its tensor and measure.
_MOST = 2.0
# The name of all dtypes together.
EVERY = "every dtype"
# A smaller change is only in a number's last digits.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Drift:
    """A group of errors that changed beyond chance.

    Attributes:
        what: ``outputs``, ``gradients``, or a tensor and a measure, e.g. ``grad_weight/relative_norm``.
        dtype: The dtype's name, or ``every dtype``.
        cases: The number of cases with changed errors.
        larger: The number of these cases with larger errors now.
        ratio: The errors now divided by the errors before; the median over cases.
        p: The p-value, corrected for the other groups of its question.
        bound_ratio: The bounds now divided by the bounds before; the median over cases.
        from_reference: Whether the bounds are measured on the reference.
        kind: ``outputs`` or ``gradients``.
        steepest: For ``outputs`` or ``gradients``, the tensors and measures with the smallest p-values.
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
        """Whether the group has all outputs or all gradients."""
        return self.what == self.kind


@dataclass(frozen=True)
class Question:
    """A question about changes: ``of`` gives the number that is tested, and ``larger`` says whether it is to grow."""

    of: Callable[[Change], float]
    larger: bool = True

    def signed(self, change: Change) -> float:
        """The number that is tested, positive if the answer is yes."""
        value = self.of(change)
        return 0.0 if abs(value) < _NOTHING else (value if self.larger else -value)


def enough_cases(found: Sequence[Change], false_alarm: float = FALSE_ALARM) -> bool:
    """Whether growth in every changed case would be found. By chance, n cases agree with the probability 2⁻ⁿ."""
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
        found: The change of each error.
        question: The question about these changes.
        false_alarm: Probability that any group is returned by chance; it applies to groups of tensors and to single
            tensors separately.
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
    """Outputs and gradients by dtype: for each case the mean change over tensors and measures, in usual changes."""
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
    """The tensors and measures of a group that have the smallest p-values, with their ratios."""
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
