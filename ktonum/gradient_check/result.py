"""The result of a gradient check, in numbers and in words. Like `ktonum.results`, it does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ktonum.results import BoundKind, BoundSource, CheckResult, Localisation, Measurement, Power, Verdict

__all__ = ["GradcheckResult", "InputGradient", "Location", "ProbeMeasurement"]


@dataclass(frozen=True)
class ProbeMeasurement:
    """One directional derivative of s = sum_k <u_k, f_k(x)>, analytic against finite difference.

    Attributes:
        inputs: Positions of the inputs that moved together.
        analytic: ``<g, d>`` with g from backward.
        finite_difference: The extrapolated central difference.
        error_bar: Bound on the error of the finite difference and on the rounding of the analytic value.
        threshold: ``error_bar`` times the confidence factor; a larger mismatch is a defect.
        noise: Standard deviation of a half difference of s, from the residual of the fit.
        step: The largest step in the fit, as a share of each input's mean magnitude (within a factor of √2).
        levels: Number of steps evaluated.
    """

    inputs: tuple[int, ...]
    analytic: float
    finite_difference: float
    error_bar: float
    threshold: float
    noise: float
    step: float
    levels: int

    @property
    def mismatch(self) -> float:
        """``|analytic - finite_difference|``."""
        return abs(self.analytic - self.finite_difference)

    @property
    def use(self) -> float:
        """Mismatch over threshold. Above 1, the gradient is wrong."""
        return self.mismatch / self.threshold if self.threshold > 0.0 else float("inf" if self.mismatch else 0.0)

    @property
    def flagged(self) -> bool:
        """Whether the mismatch is beyond the threshold."""
        return self.flags(self.analytic)

    def flags(self, analytic: float) -> bool:
        """Whether the mismatch would be beyond the threshold with this analytic value in place of the measured one."""
        return abs(analytic - self.finite_difference) > self.threshold


@dataclass(frozen=True)
class InputGradient:
    """The check of one input's gradient.

    Attributes:
        position: Position among the differentiated tensors.
        name: The tensor's name, e.g. ``input 0``, ``input 1['scale']`` or ``parameter weight``.
        verdict: PASS, FAIL or INCONCLUSIVE.
        reason: Why the verdict is not a plain PASS; empty if it is.
        own_direction: Whether the measurement below moved this input alone.
        contribution: This input's share of ``analytic``: ``<g, d>`` over its own elements.
        analytic: The directional derivative from backward.
        finite_difference: The same derivative by finite differences.
        error_bar: See `ProbeMeasurement`.
        use: Mismatch over threshold of the worst probe that moved this input. Above 1, the gradient is wrong.
        relative_power: The smallest e for which a gradient of this input that is scaled by 1 + e or by 1 - e would have
            been flagged, whichever of the two is harder to see; ``inf`` for a gradient of zero.
        element_power: The smallest absolute error in any single element of this input's gradient that would have been
            flagged, in the unit of the contracted gradient (of the loss itself for a scalar output).
        element_rms: Root mean square of the elements of that gradient. Compare `element_power` with it.
    """

    position: int
    name: str
    verdict: Verdict
    reason: str
    own_direction: bool
    contribution: float
    analytic: float
    finite_difference: float
    error_bar: float
    use: float
    relative_power: float
    element_power: float
    element_rms: float


@dataclass(frozen=True)
class Location:
    """Where a defect was found.

    Attributes:
        position: Position of the input.
        index: Index of the wrong element, or None if no single element stands out.
        wrong_by: Analytic minus finite difference of that element; None without an element.
        share: The element's part of the whole mismatch; about 1 for a single wrong element.
        evaluations: Forward evaluations that the search took.
        words: The same in words.
    """

    position: int
    index: tuple[int, ...] | None
    wrong_by: float | None
    share: float
    evaluations: int
    words: str


@dataclass(frozen=True)
class GradcheckResult:
    """The result of `ktonum.gradcheck`. It is truthy if the verdict is PASS, and only then.

    Attributes:
        verdict: PASS, FAIL or INCONCLUSIVE.
        reason: One sentence.
        inputs: One entry for each differentiated input.
        probes: All directional derivatives that were measured.
        worst_input: Position of the input with the wrong gradient; if there is none, of an inconclusive input, or else
            of the input with the largest mismatch over threshold. None if nothing was measured.
        worst_index: Index of the wrong element if the check failed and a single element stands out; otherwise None.
        wrong_by: Analytic minus finite difference of that element.
        evaluations: Forward evaluations of fn for the check, including the one for backward.
        localise_evaluations: Further evaluations, after a mismatch or where the check could not tell yet.
        precision: The precision that fn is assumed to compute in.
        seed: Seed of directions and cotangents.
    """

    verdict: Verdict
    reason: str
    inputs: tuple[InputGradient, ...] = ()
    probes: tuple[ProbeMeasurement, ...] = ()
    worst_input: int | None = None
    worst_index: tuple[int, ...] | None = None
    wrong_by: float | None = None
    evaluations: int = 0
    localise_evaluations: int = 0
    precision: str = "float64"
    seed: int = 0

    def __bool__(self) -> bool:
        return self.verdict is Verdict.PASS

    def __str__(self) -> str:
        return self.summary()

    def to_check_result(self, *, case: str, check: str) -> CheckResult:
        """This result as the result of one check of an audit.

        Args:
            case: The case's name.
            check: The check's name.
        """
        measurements, power = [], []
        for entry in self.inputs:
            gradient = f"grad_{entry.name}"
            measurements.append(
                Measurement(
                    gradient,
                    "finite_difference",
                    entry.use,
                    1.0,
                    "bound",
                    BoundSource(BoundKind.ERROR_BAR, scale=2.0),
                    self.worst_index if entry.position == self.worst_input else None,
                )
            )
            sizes = (
                ("scaling", "by 1 + size", entry.relative_power),
                ("one element", "off by size", entry.element_power),
            )
            power += [Power(gradient, k, u, size if math.isfinite(size) else None) for k, u, size in sizes]
        return CheckResult(
            case=case,
            check=check,
            verdict=self.verdict,
            measurements=tuple(measurements),
            power=tuple(power),
            reason=self.reason,
            details=self.summary(),
            localisations=self._localised(),
        )

    def _localised(self) -> tuple[Localisation, ...]:
        """The wrong element if the search ended at one, otherwise the input."""
        if self.verdict is not Verdict.FAIL or self.worst_input is None or not self.inputs:
            return ()  # without measurements the defect is one of the whole backward, such as noise
        name = f"grad_{self.inputs[self.worst_input].name}"
        if self.worst_index is None or self.wrong_by is None:
            return (Localisation(name, "spread over many elements: no single element stands out", ""),)
        where = f"element {list(self.worst_index)}, and perhaps others" if self.worst_index else "the only element"
        return (Localisation(name, where, f"off by {self.wrong_by:.4g} from the finite difference"),)

    def summary(self) -> str:
        """One paragraph: what is wrong and where, what to do next, then the numbers and the power."""
        parts = [f"gradcheck {self.verdict.value}: {self.reason}"]
        if self.verdict is Verdict.FAIL and self.inputs:
            parts.append(_NEXT_STEP)
        worst = next((entry for entry in self.inputs if entry.position == self.worst_input), None)
        if worst is not None:
            parts.append(
                f"For {worst.name}: analytic directional derivative {worst.analytic:.12g}, finite difference "
                f"{worst.finite_difference:.12g}, error bar {worst.error_bar:.2g}; the mismatch is {worst.use:.2g} "
                f"times the threshold."
            )
        if self.inputs:
            powers = "; ".join(
                f"{e.name}: scaling by {e.relative_power:.1e}, one element by {e.element_power:.1e} "
                f"(rms of the gradient {e.element_rms:.1e}{'' if e.own_direction else ', moved together with others'})"
                for e in self.inputs
            )
            parts.append(f"The smallest defects that this check would have flagged: {powers}.")
        spent = f"{self.evaluations} evaluations"
        if self.localise_evaluations:
            spent += f", {self.localise_evaluations} more to make sure"
        parts.append(f"{spent}, precision {self.precision}, seed {self.seed}.")
        return " ".join(part for part in parts if part)


_NEXT_STEP = (
    "Next: compare backward with the derivative at this place; if fn computes in a lower precision than its inputs "
    "have, pass it, e.g. precision='float32'."
)
