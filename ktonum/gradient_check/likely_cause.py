"""The usual mistakes in a backward, recognised from a few more directions through the wrong gradient."""

from __future__ import annotations

import math

import torch

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.directional_derivative import CONFIDENCE, Probe, Setting

__all__ = ["CAUSE_EVALUATIONS", "likely_cause", "repeated_index"]

# Directions that have to agree on a cause, and steps along each.
_DIRECTIONS = 3
_STEPS = 4
#: What `likely_cause` takes.
CAUSE_EVALUATIONS = 2 * _STEPS * _DIRECTIONS
# Directions of these probe numbers are drawn for no other purpose.
_FIRST = 1000


def likely_cause(setting: Setting, position: int) -> str:
    """The cause in words, or an empty string if no usual one explains the gradient.

    It takes `CAUSE_EVALUATIONS` forward evaluations.

    Args:
        setting: The values that all probes share.
        position: The tensor with the wrong gradient.
    """
    if setting.gradients is None:
        return ""
    probes = []
    for number in range(_DIRECTIONS):
        probe = Probe(setting, {position: setting.direction(position, _FIRST + number)})
        probe.walk(setting.top, _STEPS)
        probes.append(probe)
    estimates = [probe.estimate() for probe in probes]
    if not all(math.isfinite(e.error_bar) for e in estimates):
        return ""
    leaf, gradient = setting.leaves[position], setting.gradients[position]
    if not bool(gradient.any()):
        return "it is zero, as if the path to the output were detached"
    if leaf.original.is_complex():
        conjugate = gradient * torch.tensor([1.0, -1.0], dtype=gradient.dtype, device=gradient.device)
        if all(
            _agree(float((conjugate * p.directions[position]).sum()), p, e)
            for p, e in zip(probes, estimates, strict=True)
        ):
            return "it is the conjugate of the right one: a conj() is missing, or there is one too many"
    if leaf.numbers_that_move == 1:  # any mistake in a single number is a factor, and a constant
        return ""
    slopes = [probe.contributions[position] for probe in probes]
    mismatches = [slope - e.value for slope, e in zip(slopes, estimates, strict=True)]
    # Only mismatches that are well known tell one cause from another.
    if any(100.0 * p.measurement().error_bar > abs(m) for p, m in zip(probes, mismatches, strict=True)):
        return ""
    clearest = max(range(_DIRECTIONS), key=lambda i: abs(estimates[i].value))
    if slopes[clearest] != 0.0 and estimates[clearest].value != 0.0:
        factor = slopes[clearest] / estimates[clearest].value
        if all(_agree(slope / factor, p, e) for slope, p, e in zip(slopes, probes, estimates, strict=True)):
            digits = _known_digits(estimates[clearest].error_bar / abs(estimates[clearest].value))
            return f"all of it is {factor:.{digits}g} times the right one: look for a missing or doubled factor"
    sums = [float(p.directions[position].sum()) for p in probes]
    clearest = max(range(_DIRECTIONS), key=lambda i: abs(sums[i]))
    constant = mismatches[clearest] / sums[clearest]
    if all(_agree(s - constant * t, p, e) for s, t, p, e in zip(slopes, sums, probes, estimates, strict=True)):
        digits = _known_digits(estimates[clearest].error_bar / abs(mismatches[clearest]))
        return f"every element is off by the same {constant:.{digits}g}: look for a constant that is added or left out"
    return ""


def repeated_index(setting: Setting, position: int, index: tuple[int, ...], wrong_by: float) -> str:
    """Whether an element lacks what one output adds to it, as where an index occurs twice and backward assigns.

    Args:
        setting: The values that all probes share.
        position: The tensor with the wrong gradient.
        index: The wrong element.
        wrong_by: Analytic minus finite difference of that element.
    """
    if setting.gradients is None:
        return ""
    cotangent, value = setting.contraction.cotangent, setting.gradients[position][index]
    wrong_by *= setting.contraction.scale
    has_one = bool((cotangent == value).any())
    lacks_one = bool(((cotangent + wrong_by).abs() <= 1e-4 * abs(wrong_by)).any())
    if not (has_one and lacks_one):
        return ""
    return "it has the gradient of one output and lacks that of another: where an index repeats, backward must add"


def _known_digits(relative_error: float) -> int:
    """The decimal digits of a number that are certain, at least 2 and at most 12."""
    return max(2, min(12, math.floor(-math.log10(max(relative_error, 1e-12)))))


def _agree(slope: float, probe: Probe, estimate: fd.DerivativeEstimate) -> bool:
    """Whether a corrected slope is the finite difference."""
    bar = CONFIDENCE * probe.measurement().error_bar
    return abs(slope - estimate.value) <= 2.0 * bar
