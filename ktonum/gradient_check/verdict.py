"""The verdict of a check from its measured directions. Doubtful ones are measured again, defects are searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.directional_derivative import FEWEST_LEVELS, Probe, Setting
from ktonum.gradient_check.input_verdict import judge_input
from ktonum.gradient_check.judged_probe import JudgedProbe, judge_probe
from ktonum.gradient_check.likely_cause import CAUSE_EVALUATIONS, likely_cause, repeated_index
from ktonum.gradient_check.result import GradcheckResult, InputGradient
from ktonum.gradient_check.wrong_element import localise, search_evaluations
from ktonum.results import Verdict

__all__ = ["judge"]

#: Noise of more than this many eps of the outputs may be an oscillation that is too fast for the steps. Then smaller
#: steps are measured before the check fails.
DOUBTFUL_NOISE = 1024.0
#: Central differences to confirm a mismatch, and as many at smaller steps. They are paid from localise_evaluations.
MORE_PAIRS = 4
#: The most steps of a direction through an input on which the check cannot tell. They are paid likewise.
MOST_STEPS = 12


def judge(
    setting: Setting, measured: Sequence[Probe], blank: GradcheckResult, localise_evaluations: int
) -> GradcheckResult:
    """The result of a gradient check.

    Args:
        setting: The values that all probes share.
        measured: The probes. Those with a mismatch and those that cannot tell are measured again.
        blank: A result with the precision and the seed.
        localise_evaluations: The most evaluations to measure again and to find the wrong element.
    """
    function = setting.contraction.function
    evaluations = function.calls

    def left() -> int:
        return max(localise_evaluations - (function.calls - evaluations), 0)

    for probe in measured:
        _confirm(setting, probe, left())
    measured = [*measured, *_apart(setting, measured, left())]
    judged, entries = _judged(setting, measured)
    unsure = {e.position for e in entries if e.verdict is Verdict.INCONCLUSIVE}
    if unsure and not any(j.verdict is Verdict.FAIL for j in judged):
        for probe in measured:
            if unsure & probe.directions.keys():
                _look_longer(probe, left())
                _confirm(setting, probe, left())
        judged, entries = _judged(setting, measured)
    worst = max(entries, key=lambda e: (e.verdict is Verdict.FAIL, e.verdict is Verdict.INCONCLUSIVE, e.use))
    result = replace(
        blank,
        inputs=entries,
        probes=tuple(j.measurement for j in judged),
        evaluations=evaluations,
        worst_input=worst.position,
        localise_evaluations=function.calls - evaluations,
    )
    if failed := [j for j in judged if j.verdict is Verdict.FAIL]:
        return _failure(setting, failed, result, left())
    if worst.verdict is Verdict.INCONCLUSIVE:
        return replace(result, verdict=Verdict.INCONCLUSIVE, reason=f"{worst.name}: {worst.reason}.")
    remarks = [f"{e.name}: {e.reason}" for e in entries if e.reason]
    reason = "every gradient agrees with finite differences" + "".join(f"; {remark}" for remark in remarks) + "."
    return replace(result, verdict=Verdict.PASS, reason=reason)


def _judged(setting: Setting, measured: Sequence[Probe]) -> tuple[tuple[JudgedProbe, ...], tuple[InputGradient, ...]]:
    judged = tuple(judge_probe(probe) for probe in measured)
    return judged, tuple(judge_input(setting, position, judged) for position in range(len(setting.leaves)))


def _look_longer(probe: Probe, budget: int) -> None:
    """More steps: fn may have kinks and jumps at a distance that only smaller steps keep."""
    for _ in range(min(MOST_STEPS - len(probe.taken), budget // 2)):
        if probe.lack() <= 1.0 and not probe.measurement().flagged:
            return
        probe.extend()


def _confirm(setting: Setting, probe: Probe, budget: int) -> None:
    """Measure a mismatch again before it is called a defect, if the budget allows it."""
    if not probe.measurement().flagged or budget < 2 * MORE_PAIRS:
        return
    probe.look_again(MORE_PAIRS)
    m = probe.measurement()
    doubtful = m.noise > DOUBTFUL_NOISE * setting.eps * setting.contraction.size
    if m.flagged and doubtful and budget >= 4 * MORE_PAIRS:
        probe.look_closer(MORE_PAIRS)


def _apart(setting: Setting, measured: Sequence[Probe], budget: int) -> list[Probe]:
    """Probes that move one tensor each, of those that moved only with others and mismatch, if the budget allows it."""
    alone = []
    for position in range(len(setting.leaves)):
        narrowest = min(
            (probe for probe in measured if position in probe.directions), key=lambda probe: len(probe.directions)
        )
        if len(narrowest.directions) > 1 and narrowest.measurement().flagged:
            direction = narrowest.directions[position]
            alone.append(Probe(setting, {position: direction}, within_domain=narrowest.within_domain))
    if 4 * FEWEST_LEVELS * len(alone) > budget:
        return []
    for probe in alone:
        probe.walk(setting.top, FEWEST_LEVELS)
    return alone


def _failure(
    setting: Setting,
    failed: Sequence[JudgedProbe],
    result: GradcheckResult,
    localise_evaluations: int,
) -> GradcheckResult:
    """Localise with the failed probe that moves the fewest inputs; among those, the one with the largest mismatch."""
    clearest = min(failed, key=lambda j: (len(j.probe.directions), -j.measurement.use))
    probe, m = clearest.probe, clearest.measurement
    step, error = fd.sharpest_step(probe.taken, probe.estimate())
    before = setting.contraction.function.calls
    if 16.0 * error > m.mismatch and localise_evaluations >= 8 * MORE_PAIRS:
        # The best step lies between two of the ladder.
        for factor in (setting.ratio**0.5, setting.ratio**-0.5):
            probe.take(step * factor)
        step, error = fd.sharpest_step(probe.taken, probe.estimate())
    budget = localise_evaluations - (setting.contraction.function.calls - before)
    alone = len(probe.directions) == 1
    position = next(iter(probe.directions))
    # A cause says more than an element, so it is looked for first if the element can still be found afterwards.
    first = (
        alone
        and setting.gradients is not None
        and budget >= CAUSE_EVALUATIONS + search_evaluations(probe.directions[position])
    )
    cause = likely_cause(setting, position) if first else ""
    found = localise(
        setting.contraction,
        probe.directions,
        setting.slope,
        mismatch=m.analytic - m.finite_difference,
        step=step,
        tolerance=4.0 * error,
        budget=budget - CAUSE_EVALUATIONS if first else budget,
    )
    if not first and budget - found.evaluations >= CAUSE_EVALUATIONS:
        cause = likely_cause(setting, found.position)
    name = setting.leaves[found.position].name
    absent = f" backward returned None, but the outputs depend on {name};" if found.position in setting.missing else ""
    repeated = ""
    if not cause and found.index is not None and found.wrong_by is not None:
        repeated = repeated_index(setting, found.position, found.index, found.wrong_by)
    words = "; ".join(filter(None, ("" if absent else cause, found.words, repeated)))
    reason = f"the gradient of {name} is wrong:{absent} {words}."
    entries = tuple(
        replace(e, verdict=Verdict.FAIL, reason=words) if e.position == found.position else e for e in result.inputs
    )
    return replace(
        result,
        verdict=Verdict.FAIL,
        reason=reason,
        inputs=entries,
        worst_input=found.position,
        worst_index=found.index,
        wrong_by=found.wrong_by,
        localise_evaluations=setting.contraction.function.calls - result.evaluations,
    )
