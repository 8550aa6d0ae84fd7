"""What a gradient check found, in numbers and in words. A leaf beside `ktonum.results`: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ktonum.results import CheckResult, Localisation, Measurement, Power, Verdict

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
        noise: Standard deviation of the noise of s, as seen.
        step: The largest step used, as a share of each input's mean magnitude.
        levels: Steps evaluated.
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
        """Mismatch over threshold; above 1 is a defect."""
        return self.mismatch / self.threshold if self.threshold > 0.0 else float("inf" if self.mismatch else 0.0)

    @property
    def flagged(self) -> bool:
        """Whether the analytic value is called wrong."""
        return self.flags(self.analytic)

    def flags(self, analytic: float) -> bool:
        """Whether this analytic value, in place of the measured one, would be called wrong."""
        return abs(analytic - self.finite_difference) > self.threshold


@dataclass(frozen=True)
class InputGradient:
    """The check of one input's gradient.

    Attributes:
        position: Position among the inputs.
        verdict: PASS, FAIL or INCONCLUSIVE.
        reason: Why, where it is not a plain PASS.
        own_direction: Whether the measurement below moved this input alone.
        contribution: This input's share of ``analytic``: ``<g, d>`` over its own elements.
        analytic: The directional derivative from backward.
        finite_difference: The same by finite differences.
        error_bar: See `ProbeMeasurement`.
        use: Mismatch over threshold of the worst probe that moved this input; above 1 is a defect.
        relative_power: The smallest e such that scaling this input's gradient by 1 + e or 1 - e, whichever is harder
            to see, would have been flagged; ``inf`` for a gradient of zero.
        element_power: The smallest absolute error in any single element of this input's gradient that would have been
            flagged, in the unit of the contracted gradient (of the loss itself for a scalar output).
        element_rms: Root mean square of that gradient's elements, to compare `element_power` with.
    """

    position: int
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
        position: The input.
        index: The element, or None when no single element stands out.
        wrong_by: Analytic minus finite difference of that element; None without an element.
        share: The element's part of the whole mismatch; about 1 for a single wrong element.
        evaluations: Forward evaluations spent on finding it.
        words: The finding as a phrase.
    """

    position: int
    index: tuple[int, ...] | None
    wrong_by: float | None
    share: float
    evaluations: int
    words: str


@dataclass(frozen=True)
class GradcheckResult:
    """The outcome of `ktonum.gradcheck`; truthy unless the verdict is FAIL.

    Attributes:
        verdict: PASS, FAIL or INCONCLUSIVE.
        reason: One sentence.
        inputs: One entry for each differentiated input.
        probes: Every directional derivative measured.
        worst_input: Position of the input with the largest share of its threshold used, None if nothing was measured.
        worst_index: Index of the wrong element, when the check failed and one could be singled out.
        wrong_by: Analytic minus finite difference of that element.
        evaluations: Forward evaluations of fn used by the check, the analytic one included.
        localise_evaluations: Further evaluations used after a mismatch, to confirm it and to find the wrong element.
        precision: The precision that fn was taken to compute in.
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
        return self.verdict is not Verdict.FAIL

    def __str__(self) -> str:
        return self.summary()

    def to_check_result(self, *, case: str, check: str, names: Sequence[str]) -> CheckResult:
        """This result as one check of an audit.

        Args:
            case: The case's name.
            check: The check's name.
            names: A name for each input position, e.g. ``("input", "weight")``.
        """
        measurements, power = [], []
        for entry in self.inputs:
            gradient = f"grad_{names[entry.position]}"
            measurements.append(
                Measurement(
                    name=f"{gradient}/finite_difference",
                    value=entry.use,
                    bound=1.0,
                    unit="bound",
                    bound_source="error bar of the extrapolated central difference, times a confidence factor of 2",
                    where=str(list(self.worst_index))
                    if self.worst_index and entry.position == self.worst_input
                    else "",
                )
            )
            sizes = (("scaling, by 1 + size", entry.relative_power), ("one element, off by size", entry.element_power))
            power += [Power(f"{gradient}: {what}", size if math.isfinite(size) else None) for what, size in sizes]
        return CheckResult(
            case=case,
            check=check,
            verdict=self.verdict,
            measurements=tuple(measurements),
            power=tuple(power),
            reason=self.reason,
            details=self.summary(),
            localisations=self._localised(names),
        )

    def _localised(self, names: Sequence[str]) -> tuple[Localisation, ...]:
        """Differences see a direction at a time: where halving it ended at an element, that one, else the input."""
        if self.verdict is not Verdict.FAIL or self.worst_input is None:
            return ()
        name = f"grad_{names[self.worst_input]}"
        if self.worst_index is None or self.wrong_by is None:
            return (Localisation(name, "spread over many elements: no single one stands out", ""),)
        where = f"element {list(self.worst_index)}, and perhaps others" if self.worst_index else "the only element"
        return (Localisation(name, where, f"off by {self.wrong_by:.4g} from the finite difference"),)

    def summary(self) -> str:
        """One paragraph: what was found, where, measured against which error bar, with which power, what to do next."""
        parts = [f"gradcheck {self.verdict.value}: {self.reason}"]
        worst = next((entry for entry in self.inputs if entry.position == self.worst_input), None)
        if worst is not None:
            parts.append(
                f"Input {worst.position}: analytic directional derivative {worst.analytic:.12g}, finite difference "
                f"{worst.finite_difference:.12g}, error bar {worst.error_bar:.2g} ({worst.use:.2g} of the threshold)."
            )
        if self.inputs:
            powers = "; ".join(
                f"input {e.position}: scaling by {e.relative_power:.1e}, one element by {e.element_power:.1e} "
                f"(rms {e.element_rms:.1e}{'' if e.own_direction else ', moved together with others'})"
                for e in self.inputs
            )
            parts.append(f"Smallest defects this check would have flagged: {powers}.")
        spent = f"{self.evaluations} evaluations"
        if self.localise_evaluations:
            spent += f" and {self.localise_evaluations} to confirm and localise"
        parts.append(f"{spent}, precision {self.precision}, seed {self.seed}.")
        parts.append(_NEXT_STEP[self.verdict])
        return " ".join(part for part in parts if part)


_NEXT_STEP = {
    Verdict.PASS: "",
    Verdict.FAIL: "Next: compare the backward with the derivative at the place named; if fn computes in a lower "
    "precision than its inputs have, tell so with precision=.",
    Verdict.INCONCLUSIVE: "Next: move the inputs away from kinks, give a larger max_evaluations, or make fn compute in "
    "float64 throughout.",
    Verdict.ERROR: "",
}
