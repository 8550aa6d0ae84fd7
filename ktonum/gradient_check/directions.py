"""Directions through the inputs of a gradient check: which to measure, how closely, with which error bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.checked_function import CheckedFunction, Contraction, seeded_signs
from ktonum.gradient_check.result import ProbeMeasurement

__all__ = ["FEWEST_LEVELS", "ZERO_GRADIENT", "Probe", "Setting", "measure"]

#: A mismatch beyond this many error bars is a defect. The bar is itself a bound at a risk of 1e-6 (Student's t).
CONFIDENCE = 2.0
#: A direction is measured more closely until its threshold is below this share of its derivative, or levels run out.
WANTED_POWER = 1e-7
#: Fewest steps a direction needs: two Taylor terms, and two degrees of freedom for the noise.
FEWEST_LEVELS = 4
USUAL_LEVELS = 5
MOST_LEVELS = 8
#: Draws until a direction is well aligned with the gradient; each succeeds with probability 0.6.
MOST_DRAWS = 16
#: Rounding of backward, in units of eps * ||g * d||.
BACKWARD_ROUNDING = 4.0
#: A gradient this far below eps * |s| per natural unit of x is zero up to rounding.
ZERO_GRADIENT = 64.0 * 2.0**-52


@dataclass
class Setting:
    """What all probes share."""

    contraction: Contraction
    gradients: dict[int, torch.Tensor]
    missing: frozenset[int]
    eps: float
    backward_eps: float
    repeat_noise: float
    seed: int

    @property
    def ratio(self) -> float:
        return fd.RATIO if self.eps < 1e-10 else 4.0

    @property
    def top(self) -> float:
        """First step: well inside a function's natural scale in float64, near it where noise rules."""
        return 2.0**-5 if self.eps < 1e-10 else 2.0**-2

    def input(self, position: int) -> torch.Tensor:
        x: torch.Tensor = self.contraction.function.inputs[position].detach().double()
        return x

    def direction(self, position: int, probe: int) -> torch.Tensor:
        """Signed random, scaled by the power of two nearest to the input's mean magnitude (1 for an input of zeros).

        Drawn again while ``<g, d>`` happens to be small against ``||g * d||``: such a direction would see scaling
        errors dimly. This costs no evaluation of fn, and leaves what is orthogonal to g as random as before.
        """
        x, gradient = self.input(position), self.gradients[position]
        mean = float(x.abs().mean())
        scale = 2.0 ** round(math.log2(mean)) if mean > 0.0 else 1.0
        for draw in range(MOST_DRAWS):
            direction = scale * seeded_signs(x.shape, x.device, self.seed, 1, position, probe, draw)
            if float((gradient * direction).sum().abs()) >= 0.5 * float((gradient * direction).norm()):
                break
        return direction


@dataclass
class Probe:
    """One direction over one or several inputs, and what was measured along it."""

    setting: Setting
    directions: dict[int, torch.Tensor]
    taken: list[fd.HalfDifference] = field(default_factory=list)
    bends: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        gradients = self.setting.gradients
        self.contributions = {p: float((gradients[p] * d).sum()) for p, d in self.directions.items()}
        self.norms = {p: float((gradients[p] * d).norm()) for p, d in self.directions.items()}
        # Inputs are rounded when they are displaced: each by eps / 2 of its size, at random.
        displaced = [
            float((gradients[p] * (self.setting.input(p).abs() + d.abs())).norm()) for p, d in self.directions.items()
        ]
        self.displacement = math.hypot(*displaced)

    def take(self, step: float) -> None:
        odd, bend = self.setting.contraction.half_difference(self.directions, step)
        self.taken.append(fd.HalfDifference(step, odd))
        self.bends.append((step, bend))

    def walk(self, top: float, levels: int) -> None:
        for step in fd.ladder(top, levels, self.setting.ratio):
            self.take(step)

    def extend(self) -> None:
        size = self.setting.contraction.size
        self.take(fd.next_step(self.taken, self.estimate(), size=size, ratio=self.setting.ratio))

    def estimate(self) -> fd.DerivativeEstimate:
        return fd.extrapolate(self.taken, noise_floor=self.noise_floor)

    @property
    def noise_floor(self) -> float:
        setting = self.setting
        rounding = 0.5 * setting.eps * (setting.contraction.size + self.displacement)
        return rounding + setting.repeat_noise + 0.25 * setting.contraction.granularity

    def look_again(self, pairs: int) -> None:
        """Further steps between the largest two of the fit, which carry it: noise that agreed by accident shows up.

        They leave the kink test alone, which needs steps of one ratio.
        """
        top = self.estimate().step
        for number in range(1, pairs + 1):
            step = top * self.setting.ratio ** (-number / (pairs + 1))
            odd, _ = self.setting.contraction.half_difference(self.directions, step)
            self.taken.append(fd.HalfDifference(step, odd))

    def look_closer(self, pairs: int) -> None:
        """Steps so small that what analytic and finite difference disagree on would drown in the noise seen.

        Noise stays as it is there. An oscillation too fast for the ladder, which looks like noise from afar, dies
        down instead, and the estimate then follows it.
        """
        m = self.measurement()
        start = min(m.noise / (16.0 * m.mismatch), min(d.step for d in self.taken) / self.setting.ratio)
        for step in fd.ladder(2.0 ** math.floor(math.log2(start)), pairs, self.setting.ratio):
            self.take(step)

    def unresponsive(self) -> bool:
        """Whether fn stands still at small steps, and the differences without those agree with backward."""
        moved = [d for d in self.taken if d.odd != 0.0]
        if len(moved) == len(self.taken) or len(moved) < FEWEST_LEVELS - 1:
            return False
        other = fd.extrapolate(moved, noise_floor=self.noise_floor)
        return abs(other.value - self.measurement().analytic) <= CONFIDENCE * other.error_bar

    def measurement(self) -> ProbeMeasurement:
        estimate, size = self.estimate(), self.setting.contraction.size
        # Noise beyond eps means that fn works in a lower precision, and so does its backward.
        seen = min(estimate.noise / size, 1e-2) if size > 0.0 and math.isfinite(estimate.noise) else 0.0
        rounding = BACKWARD_ROUNDING * max(self.setting.backward_eps, seen) * math.hypot(*self.norms.values())
        bar = estimate.error_bar + rounding
        return ProbeMeasurement(
            inputs=tuple(self.directions),
            analytic=math.fsum(self.contributions.values()),
            finite_difference=estimate.value,
            error_bar=bar,
            threshold=CONFIDENCE * bar,
            noise=estimate.noise,
            step=estimate.step,
            levels=len(self.taken),
        )

    def lack(self) -> float:
        """Threshold over the threshold wanted for the faintest input moved; above 1 asks for more steps."""
        size = self.setting.contraction.size
        wanted = max(WANTED_POWER, 2.0**12 * self.setting.eps)
        faintest = min((n for n in self.norms.values() if n > ZERO_GRADIENT * size), default=size)
        threshold = self.measurement().threshold
        return threshold / (wanted * faintest) if faintest > 0.0 else 0.0


def measure(setting: Setting, probes: int) -> list[Probe]:
    """Own directions first, then closer looks where they are needed, then joint directions, within the budget."""
    function = setting.contraction.function
    count = min(len(function.positions), function.pairs_left // FEWEST_LEVELS)
    levels = USUAL_LEVELS if function.pairs_left >= USUAL_LEVELS * count + 3 else FEWEST_LEVELS
    firsts = {p: setting.direction(p, 0) for p in function.positions}
    measured = []
    for group in _alike(setting, firsts, count):
        probe = Probe(setting, {p: firsts[p] for p in group})
        probe.walk(setting.top, levels)
        measured.append(probe)
    _sharpen(measured, function)
    for number in range(1, probes):
        if function.pairs_left < FEWEST_LEVELS:
            break
        joint = Probe(setting, {p: setting.direction(p, number) for p in function.positions})
        steps = [probe.estimate().step for probe in measured]
        joint.walk(min([setting.top, *filter(math.isfinite, steps)]), min(USUAL_LEVELS, function.pairs_left))
        measured.append(joint)
    return measured


def _alike(setting: Setting, directions: dict[int, torch.Tensor], count: int) -> list[list[int]]:
    """Positions in ``count`` groups of like ``||g * d||``, cut at the largest jumps: in company a faint one is lost."""
    size = {p: max(float((setting.gradients[p] * d).norm()), 1e-300) for p, d in directions.items()}
    ordered = sorted(directions, key=lambda p: -size[p])
    jumps = sorted(range(1, len(ordered)), key=lambda i: -size[ordered[i - 1]] / size[ordered[i]])
    cuts = [0, *sorted(jumps[: count - 1]), len(ordered)]
    return [sorted(ordered[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _sharpen(measured: Sequence[Probe], function: CheckedFunction) -> None:
    """Give further steps to the direction that lacks most, one at a time."""
    while function.pairs_left >= 1:
        open_probes = [probe for probe in measured if len(probe.taken) < MOST_LEVELS]
        worst = max(open_probes, key=Probe.lack, default=None)
        if worst is None or worst.lack() <= 1.0:
            return
        worst.extend()
