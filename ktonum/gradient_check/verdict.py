"""Verdicts, power and the place of a defect, from measured directional derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.directions import ZERO_GRADIENT, Probe, Setting
from ktonum.gradient_check.result import GradcheckResult, InputGradient, ProbeMeasurement
from ktonum.gradient_check.wrong_element import localise
from ktonum.results import Verdict

__all__ = ["judge"]

#: If the check would miss this relative error of a gradient, the verdict is INCONCLUSIVE instead of PASS.
WORST_RELATIVE_POWER = 1e-3
#: A kink can explain a mismatch of up to this many times its slope jump, because jumps of several elements partly
#: cancel.
KINK_REACH = 16.0
#: Noise of more than this many eps of the outputs may be an oscillation that is too fast for the steps. Then smaller
#: steps are measured before the check fails.
DOUBTFUL_NOISE = 1024.0
#: Central differences to confirm a mismatch, and as many at smaller steps. They are paid from localise_evaluations.
MORE_PAIRS = 4


def judge(
    setting: Setting, measured: Sequence[Probe], blank: GradcheckResult, localise_evaluations: int
) -> GradcheckResult:
    """The result of a gradient check.

    Args:
        setting: The values that all probes share.
        measured: The probes. Those with a mismatch are measured again.
        blank: A result with the precision and the seed.
        localise_evaluations: The most evaluations to confirm a mismatch and to find the wrong element.
    """
    function = setting.contraction.function
    evaluations = function.calls
    for probe in measured:
        _confirm(setting, probe, localise_evaluations - (function.calls - evaluations))
    extra = function.calls - evaluations
    measurements = tuple(probe.measurement() for probe in measured)
    judged = {id(probe): _judge_probe(probe, m) for probe, m in zip(measured, measurements, strict=True)}
    failed = [
        (probe, m) for probe, m in zip(measured, measurements, strict=True) if judged[id(probe)][0] is Verdict.FAIL
    ]
    entries = tuple(_judge_input(setting, p, measured, measurements, judged) for p in function.positions)
    worst = max(entries, key=lambda e: (e.verdict is Verdict.FAIL, e.verdict is Verdict.INCONCLUSIVE, e.use))
    result = replace(
        blank,
        inputs=entries,
        probes=measurements,
        evaluations=evaluations,
        worst_input=worst.position,
        localise_evaluations=extra,
    )
    if failed:
        return _failure(setting, failed, result, max(localise_evaluations - extra, 0))
    if worst.verdict is Verdict.INCONCLUSIVE:
        return replace(result, verdict=Verdict.INCONCLUSIVE, reason=f"input {worst.position}: {worst.reason}.")
    remarks = [f"input {e.position}: {e.reason}" for e in entries if e.reason]
    reason = "every gradient agrees with finite differences" + "".join(f"; {remark}" for remark in remarks) + "."
    return replace(result, verdict=Verdict.PASS, reason=reason)


def _confirm(setting: Setting, probe: Probe, budget: int) -> None:
    """Measure a mismatch again before it is called a defect, if the budget allows it."""
    if not probe.measurement().flagged or budget < 2 * MORE_PAIRS:
        return
    probe.look_again(MORE_PAIRS)
    m = probe.measurement()
    doubtful = m.noise > DOUBTFUL_NOISE * setting.eps * setting.contraction.size
    if m.flagged and doubtful and budget >= 4 * MORE_PAIRS:
        probe.look_closer(MORE_PAIRS)


def _judge_probe(probe: Probe, measurement: ProbeMeasurement) -> tuple[Verdict, str]:
    if not math.isfinite(measurement.error_bar):
        return Verdict.INCONCLUSIVE, "fn is not finite close to this point; move the inputs away from there"
    if not measurement.flagged:
        return Verdict.PASS, ""
    kink = fd.kink_slope(probe.bends)
    if measurement.mismatch <= KINK_REACH * kink:
        return Verdict.INCONCLUSIVE, (
            f"fn is not smooth at this point: its slope jumps by {kink:.2g}, the mismatch is "
            f"{measurement.mismatch:.2g}; move the inputs away from the kink"
        )
    if probe.unresponsive():
        return (
            Verdict.INCONCLUSIVE,
            "fn does not change at small steps; pass the precision that it computes in, e.g. precision='float32'",
        )
    return Verdict.FAIL, f"analytic {measurement.analytic:.12g}, finite difference {measurement.finite_difference:.12g}"


def _judge_input(
    setting: Setting,
    position: int,
    measured: Sequence[Probe],
    measurements: Sequence[ProbeMeasurement],
    judged: dict[int, tuple[Verdict, str]],
) -> InputGradient:
    """The verdict on one input, with the power of the most sensitive probe that moved it."""
    moved = [(probe, m) for probe, m in zip(measured, measurements, strict=True) if position in probe.directions]
    verdicts = [judged[id(probe)] for probe, _ in moved]
    probe, m = min(moved, key=lambda pair: _relative_power(pair[1], pair[0].contributions[position]))
    power = _relative_power(m, probe.contributions[position])
    if math.isinf(power):
        probe, m = min(moved, key=lambda pair: pair[1].threshold)
    size, smallest = setting.contraction.size, float(probe.directions[position].abs().min())
    verdict, reason = Verdict.PASS, ""
    for wanted in (Verdict.INCONCLUSIVE, Verdict.FAIL):
        verdict, reason = next(((v, r) for v, r in verdicts if v is wanted), (verdict, reason))
    # Compare with the outputs at x. An exponential can be so large at the largest steps that a real gradient would look
    # like rounding.
    here = setting.contraction.measure(setting.contraction.base) or size
    if verdict is Verdict.PASS and probe.norms[position] <= ZERO_GRADIENT * here:
        share = _detectable(m) / here if here > 0.0 else 0.0
        reason = (
            f"its gradient is zero up to rounding; moving it by its own size changes the outputs by less than "
            f"{share:.1e} of their size"
        )
        verdict = Verdict.PASS if share <= WORST_RELATIVE_POWER else Verdict.INCONCLUSIVE
    elif verdict is Verdict.PASS and power > WORST_RELATIVE_POWER:
        verdict, reason = Verdict.INCONCLUSIVE, _blind(setting, probe, m, power)
    use = max(other.use for _, other in moved)
    shown = max((other for _, other in moved), key=lambda o: o.use) if verdict is Verdict.FAIL else m
    return InputGradient(
        position=position,
        verdict=verdict,
        reason=reason,
        own_direction=len(shown.inputs) == 1,
        contribution=probe.contributions[position],
        analytic=shown.analytic,
        finite_difference=shown.finite_difference,
        error_bar=shown.error_bar,
        use=use,
        relative_power=power,
        element_power=_detectable(m) / smallest,
        element_rms=float(setting.gradients[position].square().mean().sqrt()),
    )


def _detectable(m: ProbeMeasurement) -> float:
    """The error of the analytic value that is flagged with either sign; the threshold if it is flagged already."""
    return m.threshold if m.flagged else m.threshold + m.mismatch


def _relative_power(m: ProbeMeasurement, contribution: float) -> float:
    """The smallest relative error of one input's gradient that is flagged with either sign; infinity if there is none.

    Both signs are planted to confirm it.
    """
    if contribution == 0.0 or not math.isfinite(m.threshold):
        return math.inf
    # The planted value is rounded. Leave room for that, or the confirmation can fail by the last bit.
    error = _detectable(m) * (1.0 + 1e-9) + 2.0**-50 * (abs(m.analytic) + abs(m.finite_difference))
    power = error / abs(contribution)
    center = m.finite_difference if m.flagged else m.analytic
    return power if all(m.flags(center + sign * power * contribution) for sign in (1.0, -1.0)) else math.inf


def _blind(setting: Setting, probe: Probe, m: ProbeMeasurement, power: float) -> str:
    """Why a check has no power: the noise is too large, or fn is not smooth at any of the steps."""
    size = setting.contraction.size
    limit = f"a relative error of {power:.1e} would have been missed"
    if m.noise > fd.LARGEST_NOISE * size or not probe.estimate().converged and m.noise > 1e4 * setting.eps * size:
        share = m.noise / size if size else 0.0
        return (
            f"{limit}, because the finite differences do not converge: fn has noise of {share:.1e} of its outputs, or "
            f"is not smooth at this point; move the inputs"
        )
    return f"{limit}, because noise of {m.noise / size if size else 0.0:.1e} of the outputs hides the gradient"


def _failure(
    setting: Setting,
    failed: Sequence[tuple[Probe, ProbeMeasurement]],
    result: GradcheckResult,
    localise_evaluations: int,
) -> GradcheckResult:
    """Localise with the failed probe that moves the fewest inputs; among those, the one with the largest mismatch."""
    probe, m = min(failed, key=lambda pair: (len(pair[1].inputs), -pair[1].use))
    step, error = fd.sharpest_step(probe.taken, probe.estimate())
    found = localise(
        setting.contraction,
        probe.directions,
        {p: setting.gradients[p] for p in probe.directions},
        mismatch=m.analytic - m.finite_difference,
        step=step,
        tolerance=4.0 * error,
        budget=localise_evaluations,
    )
    absent = (
        " backward returned None, but the outputs depend on this input;" if found.position in setting.missing else ""
    )
    reason = f"the gradient of input {found.position} is wrong:{absent} {found.words}."
    entries = tuple(
        replace(e, verdict=Verdict.FAIL, reason=found.words) if e.position == found.position else e
        for e in result.inputs
    )
    return replace(
        result,
        verdict=Verdict.FAIL,
        reason=reason,
        inputs=entries,
        worst_input=found.position,
        worst_index=found.index,
        wrong_by=found.wrong_by,
        localise_evaluations=result.localise_evaluations + found.evaluations,
    )
