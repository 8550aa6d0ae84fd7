"""A derivative along one direction: the analytic one, finite differences, and the error bar of the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ktonum.gradient_check import differences as fd
from ktonum.gradient_check.bends import jump
from ktonum.gradient_check.contraction import Contraction
from ktonum.gradient_check.leaf import Leaf
from ktonum.gradient_check.result import ProbeMeasurement

__all__ = ["CONFIDENCE", "FEWEST_LEVELS", "ZERO_GRADIENT", "Probe", "Setting"]

#: A mismatch of more than this many error bars is a defect. One bar is already a bound at a risk of 1e-6 (Student's t).
CONFIDENCE = 2.0
#: A direction gets more steps until an error of this share of one typical element would be seen, or no step is left.
WANTED_POWER = 1e-6
#: The fewest steps for a direction: two for Taylor terms, and two more to measure the noise.
FEWEST_LEVELS = 4
#: The most draws of a direction until it is aligned well enough with the gradient. Each succeeds with probability 0.6.
MOST_DRAWS = 16
#: Bound on the rounding of backward, in units of eps * ||g * d||.
BACKWARD_ROUNDING = 4.0
#: Exponentials and logarithms of numbers of magnitude m are known to m roundings, and so is a backward that uses them.
#: That is granted up to this share of the gradient, or this many eps where that is more.
LARGEST_AMPLIFICATION = (2.0**-38, 2.0**10)
#: A gradient counts as zero up to rounding if ||g * d|| is at most this share of the size of s.
ZERO_GRADIENT = 64.0 * 2.0**-52


@dataclass
class Setting:
    """The values that all probes share.

    Attributes:
        contraction: The checked function; its outputs contracted to one number s.
        gradients: The gradient of s from backward, float64, by position; None where forward-mode derivatives are
            checked in their place.
        slope: The analytic derivative of s along a direction of the tensor at a position.
        missing: Positions of the tensors for which backward returned None.
        eps: Machine epsilon of the precision that fn computes in.
        analytic_eps: Machine epsilon of the precision that the analytic derivatives are computed in.
        repeat_noise: Root sum of squares of the difference between two evaluations at x, each weighted with u.
        gradient_noise: The largest difference of any element of the gradients between two backward runs, if the caller
            allows one.
        seed: Seed of the directions.
    """

    contraction: Contraction
    gradients: Mapping[int, torch.Tensor] | None
    slope: Callable[[int, torch.Tensor], float]
    missing: frozenset[int]
    eps: float
    analytic_eps: float
    repeat_noise: float
    gradient_noise: float
    seed: int

    @cached_property
    def magnitude(self) -> float:
        """The largest finite number among inputs and outputs."""
        arrays = [leaf.value for leaf in self.leaves] + [self.contraction.base]
        return max(float(a.nan_to_num(0.0, 0.0, 0.0).abs().amax()) for a in arrays if a.numel())

    @property
    def leaves(self) -> Sequence[Leaf]:
        """The tensors that are differentiated."""
        return self.contraction.function.leaves

    @property
    def ratio(self) -> float:
        """Ratio of neighbouring steps. It is smaller in low precision, where noise leaves less room for steps."""
        return fd.RATIO if self.eps < 1e-10 else 4.0

    @property
    def top(self) -> float:
        """The first step, in units of the input's size. It is larger in low precision, because of the noise."""
        return 2.0**-5 if self.eps < 1e-10 else 2.0**-2

    def direction(self, position: int, probe: int) -> torch.Tensor:
        """Random numbers of both signs, in the unit of the tensor's mean magnitude.

        A direction is drawn again if ``<g, d>`` is small compared with ``||g * d||``, because it would show scaling
        errors only weakly. This costs no evaluation of fn. The part orthogonal to g stays random.
        """
        leaf = self.leaves[position]
        gradient = None if self.gradients is None else self.gradients[position]
        for draw in range(MOST_DRAWS):
            direction = leaf.direction(self.seed, 1, position, probe, draw)
            if gradient is None:
                break
            product = gradient * direction
            if abs(float(product.sum())) >= 0.5 * float(torch.linalg.vector_norm(product)):
                break
        return direction

    def within_domain(self, position: int, direction: torch.Tensor) -> torch.Tensor:
        """The same direction with every element in proportion to that of the tensor: no step below 1 changes a sign."""
        leaf = self.leaves[position]
        own = leaf.value.abs() / leaf.unit
        return direction * (own if leaf.fixed is None else own.masked_fill(leaf.fixed, 0.0))


@dataclass
class Probe:
    """One direction through one or several inputs, and the differences that were measured along it.

    Attributes:
        setting: The values that all probes share.
        directions: What moves, by position.
        taken: The differences, in the order in which they were measured.
        bends: Step and bend of each difference.
        within_domain: Whether each element moves in proportion to itself, so that steps keep its sign.
    """

    setting: Setting
    directions: dict[int, torch.Tensor]
    taken: list[fd.HalfDifference] = field(default_factory=list)
    bends: list[tuple[float, float]] = field(default_factory=list)
    within_domain: bool = False
    _known: ProbeMeasurement | None = None
    _known_of: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        setting = self.setting
        self.contributions = {p: setting.slope(p, d) for p, d in self.directions.items()}
        if setting.gradients is None:
            self.norms = {p: abs(slope) for p, slope in self.contributions.items()}
            self.displacement = 2.0 * math.hypot(*self.norms.values())
            return
        self.norms, displaced = {}, []
        for p, d in self.directions.items():
            size, leaf = setting.gradients[p].abs(), setting.leaves[p]
            self.norms[p] = float(torch.linalg.vector_norm(size * d))
            # The displaced inputs are rounded: each has a random error of up to eps / 2 of its size.
            own = leaf.value if leaf.fixed is None else leaf.value.masked_fill(leaf.fixed, 0.0)
            displaced.append(self.norms[p] + float(torch.linalg.vector_norm(size * own)))
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
        if (step := self.locally_constant) > 0.0:
            size = self.setting.contraction.size
            bar = self.setting.eps * size / step
            return fd.DerivativeEstimate(0.0, bar, 0.0, bar, self.setting.eps * size, step, 1, 0, len(self.taken))
        return fd.extrapolate(self.taken, noise_floor=self.noise_floor)

    @property
    def locally_constant(self) -> float:
        """The largest step up to which no output moves; 0.0 unless the analytic derivative is zero up to rounding.

        Rounding, as of floor, is constant up to a step and jumps beyond it, so that no fit can follow it. At least two
        steps have to agree. With an analytic derivative other than zero the steps may just be too small to be seen.
        """
        if max(self.norms.values()) > ZERO_GRADIENT * self.setting.contraction.size_here:
            return 0.0
        still = 0.0
        for number, (step, bend) in enumerate(sorted(self.bends)):
            if bend != 0.0 or not self._odd_at(step) == 0.0:
                return still if number >= 2 else 0.0
            still = step
        return still

    def _odd_at(self, step: float) -> float:
        return next(d.odd for d in self.taken if d.step == step)

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

    @property
    def jumps(self) -> bool:
        """Whether fn has another value at this point than close to it, as where it compares an input for equality."""
        return jump(self.bends) > 2.0**10 * self.noise_floor

    def unresponsive(self) -> bool:
        """Whether fn does not change at small steps, and its differences at the other steps agree with backward."""
        moved = [d for d in self.taken if d.odd != 0.0]
        if len(moved) == len(self.taken) or len(moved) < FEWEST_LEVELS - 1:
            return False
        other = fd.extrapolate(moved, noise_floor=self.noise_floor)
        return abs(other.value - self.measurement().analytic) <= CONFIDENCE * other.error_bar

    def measurement(self) -> ProbeMeasurement:
        """The analytic derivative against the finite difference, with the error bar of their difference."""
        state = (len(self.taken), self.setting.contraction.size)
        if self._known is None or self._known_of != state:
            self._known, self._known_of = self._measured(), state
        return self._known

    def _measured(self) -> ProbeMeasurement:
        estimate, size = self.estimate(), self.setting.contraction.size
        # More noise than eps means that fn works in a lower precision. Then backward does so too.
        seen = min(estimate.noise / size, 1e-2) if size > 0.0 and math.isfinite(estimate.noise) else 0.0
        analytic_eps = self.setting.analytic_eps
        share, roundings = LARGEST_AMPLIFICATION
        amplified = min(analytic_eps * self.setting.magnitude, max(share, roundings * analytic_eps))
        relative = max(BACKWARD_ROUNDING * max(analytic_eps, seen), amplified)
        rounding = relative * math.hypot(*self.norms.values())
        moved = self.setting.gradient_noise and sum(float(d.abs().sum()) for d in self.directions.values())
        bar = estimate.error_bar + rounding + self.setting.gradient_noise * moved
        if all(d.odd == 0.0 for d in self.taken):
            # Terms that cancel exactly in fn may leave a rounding in backward. The outputs do not show their size.
            bar += self.setting.contraction.change(roundings * analytic_eps * self.setting.magnitude)
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
        """Threshold over wanted threshold, for the tensor that is hardest to see; above 1, more steps are needed."""
        wanted = min(self._wanted(p) for p in self.norms)
        return self.measurement().threshold / wanted if wanted > 0.0 else 0.0

    def _wanted(self, position: int) -> float:
        """The threshold that shows an error of `WANTED_POWER` of a typical element, alone among correct ones."""
        norm, size = self.norms[position], self.setting.contraction.size
        norm = norm if norm > ZERO_GRADIENT * size else size
        elements = self.setting.leaves[position].value.numel()
        return norm * max(WANTED_POWER / math.sqrt(elements), 2.0**12 * self.setting.eps)

    @property
    def settles(self) -> bool:
        """Whether these tensors need no further measurement: all are seen well enough, or one is seen to be wrong."""
        flagged = self.measurement().flagged
        return (self.lack() <= 1.0 and not flagged) or (flagged and not self.spoiled)

    @property
    def spoiled(self) -> bool:
        """Whether one of several tensors may keep the others from being seen: fn jumps, or is not defined around x."""
        return self.jumps or self.within_domain or not math.isfinite(self.measurement().error_bar)

    def unseen(self) -> list[int]:
        """Positions of the tensors whose gradients are too small to be seen beside the others."""
        threshold = self.measurement().threshold
        return [p for p in self.norms if threshold > self._wanted(p)]
