"""The verdict on one direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ktonum.gradient_check.bends import kink_slope
from ktonum.gradient_check.directional_derivative import Probe
from ktonum.gradient_check.result import ProbeMeasurement
from ktonum.results import Verdict

__all__ = ["JudgedProbe", "judge_probe"]

#: A kink can explain a mismatch of up to this many times its slope jump, because jumps of several elements partly
#: cancel.
KINK_REACH = 16.0


@dataclass(frozen=True)
class JudgedProbe:
    """A direction, what was measured along it, and the verdict on that with its reason."""

    probe: Probe
    measurement: ProbeMeasurement
    verdict: Verdict
    reason: str


def judge_probe(probe: Probe) -> JudgedProbe:
    """The verdict on one direction."""
    measurement = probe.measurement()
    verdict, reason = _verdict(probe, measurement)
    return JudgedProbe(probe, measurement, verdict, reason)


def _verdict(probe: Probe, measurement: ProbeMeasurement) -> tuple[Verdict, str]:
    if not math.isfinite(measurement.error_bar):
        refusal = probe.setting.contraction.refusal
        raised = f" (it raised {refusal})" if refusal else ""
        return Verdict.INCONCLUSIVE, f"fn is not defined close to this point{raised}; move the inputs away from there"
    if not measurement.flagged:
        return Verdict.PASS, ""
    # At steps beyond those of the fit, fn may jump far away from the point.
    kink = kink_slope([(step, bend) for step, bend in probe.bends if step <= measurement.step])
    if measurement.mismatch <= KINK_REACH * kink:
        return Verdict.INCONCLUSIVE, (
            f"fn is not smooth at this point: its slope jumps by {kink:.2g}, the mismatch is "
            f"{measurement.mismatch:.2g}; move the inputs away from the kink"
        )
    if probe.jumps:
        return Verdict.INCONCLUSIVE, "fn jumps at this point; move the inputs away from the jump"
    if probe.unresponsive():
        return (
            Verdict.INCONCLUSIVE,
            "fn does not change at small steps; pass the precision that it computes in, e.g. precision='float32'",
        )
    return Verdict.FAIL, f"analytic {measurement.analytic:.12g}, finite difference {measurement.finite_difference:.12g}"
