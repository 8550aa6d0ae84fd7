"""The verdict on one input, with the power of the directions that moved it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.directional_derivative import ZERO_GRADIENT, Probe, Setting
from ktonum.gradient_check.judged_probe import JudgedProbe
from ktonum.gradient_check.leaf import Leaf
from ktonum.gradient_check.result import InputGradient, ProbeMeasurement
from ktonum.results import Verdict

__all__ = ["judge_input"]

#: If the check would miss this relative error of a gradient, the verdict is INCONCLUSIVE instead of PASS.
WORST_RELATIVE_POWER = 1e-3


def judge_input(setting: Setting, position: int, judged: Sequence[JudgedProbe]) -> InputGradient:
    """The verdict on one input, with the power of the most sensitive probe that moved it.

    Of the probes that moved it those decide that moved the fewest others.
    """
    moved = [j for j in judged if position in j.probe.directions]
    fewest = min(len(j.probe.directions) for j in moved)
    deciding = [j for j in moved if len(j.probe.directions) == fewest]
    best = min(moved, key=lambda j: _relative_power(j.measurement, j.probe.contributions[position]))
    power = _relative_power(best.measurement, best.probe.contributions[position])
    if math.isinf(power):
        best = min(moved, key=lambda j: j.measurement.threshold)
    probe, m = best.probe, best.measurement
    size = setting.contraction.size
    sizes = probe.directions[position].abs()
    smallest = float(sizes.masked_fill(sizes == 0.0, math.inf).amin())
    verdict, reason = Verdict.PASS, ""
    for wanted in (Verdict.INCONCLUSIVE, Verdict.FAIL):
        verdict, reason = next(((j.verdict, j.reason) for j in deciding if j.verdict is wanted), (verdict, reason))
    # Compare with the outputs at x. An exponential can be so large at the largest steps that a real gradient would look
    # like rounding.
    here = setting.contraction.size_here or size
    if verdict is Verdict.PASS and probe.norms[position] <= ZERO_GRADIENT * here:
        share = _detectable(m) / here if here > 0.0 else 0.0
        reason = (
            f"its gradient is zero up to rounding; moving it by its own size changes the outputs by less than "
            f"{share:.1e} of their size"
        )
        if share > WORST_RELATIVE_POWER:
            verdict, reason = Verdict.INCONCLUSIVE, f"{reason}; pass a larger max_evaluations, or move the inputs"
    elif verdict is Verdict.PASS and power > WORST_RELATIVE_POWER:
        verdict, reason = Verdict.INCONCLUSIVE, _blind(setting, probe, m, power)
    leaf = setting.leaves[position]
    if verdict is Verdict.PASS:
        reason = "; ".join(filter(None, (reason, _unmoved(leaf, probe))))
    worst = max((j.measurement for j in deciding), key=lambda other: other.use)
    shown = worst if verdict is Verdict.FAIL else m
    return InputGradient(
        position=position,
        name=leaf.name,
        verdict=verdict,
        reason=reason,
        own_direction=len(shown.inputs) == 1,
        contribution=probe.contributions[position],
        analytic=shown.analytic,
        finite_difference=shown.finite_difference,
        error_bar=shown.error_bar,
        use=worst.use,
        relative_power=power,
        element_power=_detectable(m) / smallest if smallest < math.inf else math.inf,
        element_rms=_root_mean_square(setting, position),
    )


def _unmoved(leaf: Leaf, probe: Probe) -> str:
    """Which elements' gradients were not checked; empty if all were."""
    if leaf.fixed is not None and leaf.original.layout == torch.strided:
        count = int(leaf.fixed.sum())
        return f"{count} of its elements are not finite: they stay as they are, and their gradients are not checked"
    zeros = int((leaf.value == 0.0).sum()) if probe.within_domain else 0
    if zeros:
        return f"{zeros} of its elements are zero, at the edge of fn's domain: their gradients are not checked"
    return ""


def _root_mean_square(setting: Setting, position: int) -> float:
    if setting.gradients is None:
        return math.nan
    gradient = setting.gradients[position]
    largest = float(gradient.abs().amax())
    return largest * float((gradient / largest).square().mean().sqrt()) if 0.0 < largest < math.inf else largest


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
            f"is not smooth at this point; move the inputs away from kinks, or make fn compute in float64 throughout"
        )
    return (
        f"{limit}, because noise of {m.noise / size if size else 0.0:.1e} of the outputs hides the gradient; choose "
        f"inputs where it is larger, or make fn compute in float64 throughout"
    )
