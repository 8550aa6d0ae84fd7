"""Which directions a gradient check measures, and with how many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.checked_function import CheckedFunction
from ktonum.gradient_check.directional_derivative import FEWEST_LEVELS, Probe, Setting

__all__ = ["measure"]

USUAL_LEVELS = 5
MOST_LEVELS = 8
#: So many steps outside of fn's domain, and elements are moved in proportion to themselves.
_PATIENCE = 2


def measure(setting: Setting, probes: int) -> list[Probe]:
    """Measure all tensors together, then alone those whose gradients that cannot show, within the budget.

    Args:
        setting: The values that all probes share.
        probes: How many directions move each tensor.

    Returns:
        The probes. If the budget is too small for a direction for each tensor that needs one, tensors share directions.
    """
    function = setting.contraction.function
    everything = list(range(len(function.leaves)))
    joint = _walked(setting, {p: setting.direction(p, 0) for p in everything}, FEWEST_LEVELS)
    _sharpen([joint], function, levels=FEWEST_LEVELS + 2)
    measured = [joint]
    if not joint.settles and len(everything) > 1 and function.pairs_left >= FEWEST_LEVELS:
        unseen = everything if joint.spoiled else joint.unseen()
        firsts = {p: setting.direction(p, 1) for p in unseen}
        count = min(len(unseen), function.pairs_left // FEWEST_LEVELS)
        if joint.spoiled and count > 1:
            measured = []
        # If everything would move together once more, more steps along the first direction are worth more.
        if count > 1 or not joint.spoiled:
            groups = _alike(setting, firsts, count)
            measured += [_walked(setting, {p: firsts[p] for p in group}, FEWEST_LEVELS) for group in groups]
    _sharpen(measured, function)
    for number in range(2, probes + 1):
        smooth = [probe for probe in measured if not probe.jumps]
        moved = sorted({p for probe in smooth for p in probe.directions})
        if function.pairs_left < FEWEST_LEVELS or not moved:
            break
        directions = {p: setting.direction(p, number) for p in moved}
        inside = {p for probe in smooth if probe.within_domain for p in probe.directions}
        directions |= {p: setting.within_domain(p, directions[p]) for p in inside}
        further = Probe(setting, directions, within_domain=bool(inside))
        steps = [probe.estimate().step for probe in smooth]
        further.walk(min([setting.top, *filter(math.isfinite, steps)]), min(USUAL_LEVELS, function.pairs_left))
        measured.append(further)
    return measured


def _walked(setting: Setting, directions: dict[int, torch.Tensor], levels: int) -> Probe:
    """A probe with its first ladder of steps, inside the domain of fn if the usual steps leave it."""
    probe = Probe(setting, directions)
    levels = min(levels, setting.contraction.function.pairs_left)
    steps = fd.ladder(setting.top, levels, setting.ratio) if levels > 0 else ()
    for number, step in enumerate(steps):
        if number == _PATIENCE and not any(d.usable for d in probe.taken):
            probe = Probe(setting, {p: setting.within_domain(p, d) for p, d in directions.items()}, within_domain=True)
            probe.walk(setting.top, levels - number)
            return probe
        probe.take(step)
    return probe


def _alike(setting: Setting, directions: dict[int, torch.Tensor], count: int) -> list[list[int]]:
    """The input positions in ``count`` groups of similar ``||g * d||``, cut at the largest jumps.

    A small gradient would be lost in the noise of a large one in the same group.
    """
    size = {p: max(norm, 1e-300) for p, norm in Probe(setting, directions).norms.items()}
    ordered = sorted(directions, key=lambda p: -size[p])
    jumps = sorted(range(1, len(ordered)), key=lambda i: -size[ordered[i - 1]] / size[ordered[i]])
    cuts = [0, *sorted(jumps[: count - 1]), len(ordered)]
    return [sorted(ordered[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _sharpen(measured: Sequence[Probe], function: CheckedFunction, levels: int = MOST_LEVELS) -> None:
    """Give one more step at a time to the direction that needs it most."""
    while function.pairs_left >= 1:
        open_probes = [probe for probe in measured if len(probe.taken) < levels]
        worst = max(open_probes, key=Probe.lack, default=None)
        if worst is None or worst.lack() <= 1.0:
            return
        worst.extend()
