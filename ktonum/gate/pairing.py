"""Pairs the results of an audit with those of an earlier one, and computes how each measured error changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ktonum.results import CheckResult, Measurement

__all__ = ["Change", "Pair", "Pairing", "any_grew", "changes", "pair_results"]

# A larger ratio counts as this one, because a ratio says little if chance made one of the two errors tiny.
_LARGEST = math.log(1000.0)


@dataclass(frozen=True)
class Pair:
    """One check of one case in both audits."""

    before: CheckResult
    now: CheckResult


@dataclass(frozen=True)
class Pairing:
    """Results in both audits, results only in the baseline (``vanished``), and results only in the audit (``new``)."""

    pairs: tuple[Pair, ...]
    vanished: tuple[CheckResult, ...]
    new: tuple[CheckResult, ...]


@dataclass(frozen=True)
class Change:
    """How one measured error changed. The numbers are natural logarithms of ratios: positive is larger now.

    Attributes:
        case: The case's name in the current audit.
        check: The check.
        dtype: The case's dtype.
        tensor, measure: E.g. ``grad_weight`` and ``relative_norm``.
        use: The change of error / bound.
        bound: The change of the bound. For an error in units of its bound, that of the bound on the tensor's norm; 0 if
            it is not known.
        from_reference: Whether the bound is measured on the reference, so that a better reference makes it smaller.
        sides: Error / bound before and now.
    """

    case: str
    check: str
    dtype: str
    tensor: str
    measure: str
    use: float
    bound: float
    from_reference: bool
    sides: tuple[float, float] = field(compare=False)

    @property
    def error(self) -> float:
        """The change of the error itself, computed from the changes of error / bound and of the bound."""
        return max(-_LARGEST, min(_LARGEST, self.use + self.bound))

    @property
    def kind(self) -> str:
        """``gradients`` or ``outputs``, by the name of the tensor."""
        return "gradients" if self.tensor.startswith("grad_") else "outputs"


def pair_results(baseline: Sequence[CheckResult], current: Sequence[CheckResult]) -> Pairing:
    """Pair results by case and check. Cases whose names differ only in the offset are paired, too."""
    there = _by_case(baseline)
    here = _by_case(current)
    partner = {case: case for case in here if case in there}
    left: dict[str, list[str]] = {}
    for case in there:
        if case not in partner:
            left.setdefault(_without_offset(there[case]), []).append(case)
    for case in here:
        if case not in partner and left.get(_without_offset(here[case])):
            partner[case] = left[_without_offset(here[case])].pop(0)
    pairs, new = [], []
    for case, results in here.items():
        before = there.get(partner.get(case, ""), {})
        for check, result in results.items():
            if check in before:
                pairs.append(Pair(before[check], result))
            else:
                new.append(result)
    known = {(pair.before.case, pair.before.check) for pair in pairs}
    vanished = tuple(r for r in baseline if (r.case, r.check) not in known)
    return Pairing(tuple(pairs), vanished, tuple(new))


def _by_case(results: Sequence[CheckResult]) -> dict[str, dict[str, CheckResult]]:
    found: dict[str, dict[str, CheckResult]] = {}
    for r in results:
        found.setdefault(r.case, {})[r.check] = r
    return found


def _without_offset(results: Mapping[str, CheckResult]) -> str:
    """The name of the case of these results with the offset 0."""
    result = next(iter(results.values()))
    return replace(result.parts, offset=0).name if result.parts.op else result.case


def changes(pairs: Sequence[Pair]) -> Iterator[Change]:
    """The change of every error that has a bound and is not zero in either audit.

    An exact zero is not a random rounding error. It means that two runs agree bit for bit, as the runs of a law may.
    """
    for pair in pairs:
        before = _by_key(pair.before)
        now = _by_key(pair.now)
        for key, m in now.items():
            old = before.get(key)
            if old is None or not (_is_error(m) and _is_error(old)):
                continue
            if m.unit == "bound":
                bound = _norm_bound(now, m) - _norm_bound(before, m)
                if not math.isfinite(bound):
                    bound = 0.0
            else:
                bound = math.log(m.bound / old.bound)
            use = _log(m.use) - _log(old.use)
            if math.isnan(use):  # infinite in both audits
                continue
            use = max(-_LARGEST, min(_LARGEST, use))
            yield Change(
                case=pair.now.case,
                check=pair.now.check,
                dtype=pair.now.parts.dtype,
                tensor=m.tensor,
                measure=m.measure,
                use=use,
                bound=bound,
                from_reference=m.bound_source.follows_reference and old.bound_source.follows_reference,
                sides=(old.use, m.use),
            )


def any_grew(pair: Pair) -> bool:
    """Whether any error is larger now, was an exact zero before, or is new and not zero."""
    before, now = _by_key(pair.before), _by_key(pair.now)
    zeros = [m for key, m in now.items() if m.value != 0 and (key not in before or before[key].value == 0)]
    return bool(zeros) or any(c.error > 0 for c in changes([pair]))


Key = tuple[str, str, str]


def _by_key(result: CheckResult) -> dict[Key, Measurement]:
    """Measurements by tensor, context and measure. The number of draws is not a part of the key."""
    return {(m.tensor, m.context, m.measure): m for m in result.measurements}


def _is_error(m: Measurement) -> bool:
    return m.unit in ("1", "bound") and 0 < m.bound < math.inf and m.value != 0


def _norm_bound(measured: Mapping[Key, Measurement], of: Measurement) -> float:
    norm = measured.get((of.tensor, of.context, "relative_norm"))
    return math.nan if norm is None or not 0 < norm.bound < math.inf else math.log(norm.bound)


def _log(use: float) -> float:
    return math.inf if math.isinf(use) else math.log(use)
