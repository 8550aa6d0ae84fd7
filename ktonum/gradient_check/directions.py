"""Directions through the inputs of a gradient check: which are measured, with how many steps and which error bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.checked_function import CheckedFunction, Contraction, seeded_signs
from ktonum.gradient_check.result import ProbeMeasurement

__all__ = ["FEWEST_LEVELS", "ZERO_GRADIENT", "Probe", "Setting", "measure"]

#: A mismatch of more than this many error bars is a defect. One bar is already a bound at a risk of 1e-6 (Student's t).
CONFIDENCE = 2.0
#: A direction gets more steps until its threshold is below this share of its derivative, or no step is left.
WANTED_POWER = 1e-7
#: The fewest steps for a direction: two for Taylor terms, and two more to measure the noise.
FEWEST_LEVELS = 4
USUAL_LEVELS = 5
MOST_LEVELS = 8
#: The most draws of a direction until it is aligned well enough with the gradient. Each succeeds with probability 0.6.
MOST_DRAWS = 16
#: Bound on the rounding of backward, in units of eps * ||g * d||.
BACKWARD_ROUNDING = 4.0
#: A gradient counts as zero up to rounding if ||g * d|| is at most this share of the size of s.
ZERO_GRADIENT = 64.0 * 2.0**-52


@dataclass
class Setting:
    """The values that all probes share.

    Attributes:
        contraction: The checked function; its outputs contracted to one number s.
        gradients: The gradient of s from backward, float64, by input position.
        missing: Positions of the inputs for which backward returned None.
        eps: Machine epsilon of the precision that fn computes in.
        backward_eps: Machine epsilon of the precision that backward computes in.
        repeat_noise: Root sum of squares of the difference between two evaluations at x, each weighted with ``u_k``.
        seed: Seed of the directions.
    """

    contraction: Contraction
    gradients: dict[int, torch.Tensor]
    missing: frozenset[int]
    eps: float
    backward_eps: float
    repeat_noise: float
    seed: int

    @property
    def ratio(self) -> float:
        """Ratio of neighbouring steps. It is smaller in low precision, where noise leaves less room for steps."""
        return fd.RATIO if self.eps < 1e-10 else 4.0

    @property
    def top(self) -> float:
        """The first step, in units of the input's size. It is larger in low precision, because of the noise."""
        return 2.0**-5 if self.eps < 1e-10 else 2.0**-2

    def input(self, position: int) -> torch.Tensor:
        """The input at this position in float64."""
        x: torch.Tensor = self.contraction.function.inputs[position].detach().double()
        return x

    def direction(self, position: int, probe: int) -> torch.Tensor:
        """Random numbers of both signs, times the power of two nearest to the input's mean magnitude (1 if it is zero).

        A direction is drawn again if ``<g, d>`` is small compared with ``||g * d||``, because it would show scaling
        errors only weakly. This costs no evaluation of fn. The part orthogonal to g stays random.
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
    """One direction through one or several inputs, and the differences that were measured along it."""

    setting: Setting
    directions: dict[int, torch.Tensor]
    taken: list[fd.HalfDifference] = field(default_factory=list)
    bends: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        gradients = self.setting.gradients
        self.contributions = {p: float((gradients[p] * d).sum()) for p, d in self.directions.items()}
        self.norms = {p: float((gradients[p] * d).norm()) for p, d in self.directions.items()}
        # The displaced inputs are rounded: each has a random error of up to eps / 2 of its size.
        displaced = [
            float((gradients[p] * (self.setting.input(p).abs() + d.abs())).norm()) for p, d in self.directions.items()
        ]
        self.displacement = math.hypot(*displaced)

    def take(self, step: float) -> None:
        """Measure one central difference."""
        odd, bend = self.setting.contraction.half_difference(self.directions, step)
        self.taken.append(fd.HalfDifference(step, odd))
        self.bends.append((step, bend))

    def walk(self, top: float, levels: int) -> None:
        """Measure a ladder of central differences."""
        for step in fd.ladder(top, levels, self.setting.ratio):
            self.take(step)

    def extend(self) -> None:
        """Measure at the step that would improve the estimate most."""
        size = self.setting.contraction.size
        self.take(fd.next_step(self.taken, self.estimate(), size=size, ratio=self.setting.ratio))

    def estimate(self) -> fd.DerivativeEstimate:
        """The derivative along the direction, from all differences so far."""
        return fd.extrapolate(self.taken, noise_floor=self.noise_floor)

    @property
    def noise_floor(self) -> float:
        """The least standard deviation of a half difference: rounding, nondeterminism and coarse outputs."""
        setting = self.setting
        rounding = 0.5 * setting.eps * (setting.contraction.size + self.displacement)
        return rounding + setting.repeat_noise + 0.25 * setting.contraction.granularity

    def look_again(self, pairs: int) -> None:
        """Measure between the two largest steps of the fit, which determine it most.

        If their noise agreed by accident, the new differences show it. They are left out of the kink test, which needs
        steps of one ratio.
        """
        top = self.estimate().step
        for number in range(1, pairs + 1):
            step = top * self.setting.ratio ** (-number / (pairs + 1))
            odd, _ = self.setting.contraction.half_difference(self.directions, step)
            self.taken.append(fd.HalfDifference(step, odd))

    def look_closer(self, pairs: int) -> None:
        """Measure at steps so small that the mismatch would be far below the noise seen so far.

        Real noise stays as large at these steps. An oscillation that is too fast for the ladder also looks like noise
        at large steps, but at these steps it becomes small, and the estimate then follows it.
        """
        m = self.measurement()
        start = min(m.noise / (16.0 * m.mismatch), min(d.step for d in self.taken) / self.setting.ratio)
        for step in fd.ladder(2.0 ** math.floor(math.log2(start)), pairs, self.setting.ratio):
            self.take(step)

    def unresponsive(self) -> bool:
        """Whether fn does not change at small steps, and its differences at the other steps agree with backward."""
        moved = [d for d in self.taken if d.odd != 0.0]
        if len(moved) == len(self.taken) or len(moved) < FEWEST_LEVELS - 1:
            return False
        other = fd.extrapolate(moved, noise_floor=self.noise_floor)
        return abs(other.value - self.measurement().analytic) <= CONFIDENCE * other.error_bar

    def measurement(self) -> ProbeMeasurement:
        """The analytic derivative against the finite difference, with the error bar of their difference."""
        estimate, size = self.estimate(), self.setting.contraction.size
        # More noise than eps means that fn works in a lower precision. Then backward does so too.
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
        """Threshold over wanted threshold, for the input with the smallest gradient; above 1, more steps are needed."""
        size = self.setting.contraction.size
        wanted = max(WANTED_POWER, 2.0**12 * self.setting.eps)
        faintest = min((n for n in self.norms.values() if n > ZERO_GRADIENT * size), default=size)
        threshold = self.measurement().threshold
        return threshold / (wanted * faintest) if faintest > 0.0 else 0.0


def measure(setting: Setting, probes: int) -> list[Probe]:
    """Measure first single inputs, then with more steps where needed, then joint directions, within the budget.

    Args:
        setting: The values that all probes share.
        probes: How many directions move each input. All but the first move all inputs together.

    Returns:
        The probes. If the budget is too small for a direction for each input, inputs share directions.
    """
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
    """The input positions in ``count`` groups of similar ``||g * d||``, cut at the largest jumps.

    A small gradient would be lost in the noise of a large one in the same group.
    """
    size = {p: max(float((setting.gradients[p] * d).norm()), 1e-300) for p, d in directions.items()}
    ordered = sorted(directions, key=lambda p: -size[p])
    jumps = sorted(range(1, len(ordered)), key=lambda i: -size[ordered[i - 1]] / size[ordered[i]])
    cuts = [0, *sorted(jumps[: count - 1]), len(ordered)]
    return [sorted(ordered[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _sharpen(measured: Sequence[Probe], function: CheckedFunction) -> None:
    """Give one more step at a time to the direction that needs it most."""
    while function.pairs_left >= 1:
        open_probes = [probe for probe in measured if len(probe.taken) < MOST_LEVELS]
        worst = max(open_probes, key=Probe.lack, default=None)
        if worst is None or worst.lack() <= 1.0:
            return
        worst.extend()
