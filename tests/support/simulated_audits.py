"""Audits as the rounding model has them: every element's error a normal draw, nothing else from a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ktonum.declare.cases import DTYPES
from ktonum.results import BoundKind, BoundSource, CaseParts, CheckResult, Measurement, Power, Report, Verdict

__all__ = ["ENVIRONMENT", "SimulatedAudit"]

ENVIRONMENT = {
    "ktonum": "0.1.0",
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "device": {"name": "NVIDIA H100 80GB HBM3", "capability": "sm_90", "multiprocessors": 132},
    "audit": {"op": "model", "profile": "quick", "standard": "precise"},
}
# Amplitudes as shares of the bound, as an audit of `kto` has them.
_SHARE = 0.1
_CONFIDENCE = 5.0
_POWER = (Power("", "scaling", "by 1 + size", 1e-3),)

#: What an error is multiplied by: of a tensor, in a dtype.
Factor = Callable[[str, str], float]


@dataclass(frozen=True)
class SimulatedAudit:
    """An op with three gradients and three numbers for outputs, in ten cases of each dtype, as `kto` has.

    Attributes:
        elements: Of each tensor.
        cases: In each dtype.
        error: Multiplies the errors of a tensor in a dtype.
        bound: Multiplies their bounds, too; a candidate's own error does not know it.
        source: Where the bounds come from.
        changed: The share of cases in which a rerun draws anew; the others repeat the baseline's numbers.
    """

    elements: Mapping[str, int] = field(
        default_factory=lambda: {"loss": 1, "chosen": 1, "rejected": 1, "grad_x": 600, "grad_w": 2000, "grad_b": 100}
    )
    cases: int = 10
    error: Factor = lambda tensor, dtype: 1.0
    bound: Factor = lambda tensor, dtype: 1.0
    source: BoundSource = BoundSource(BoundKind.DERIVED, "precise")
    changed: float = 1.0

    def report(
        self, seed: int, environment: Mapping[str, object] = ENVIRONMENT, *, inputs: int = 0, baseline: int = 0
    ) -> Report:
        """An audit whose inputs are drawn from ``inputs`` and whose errors from ``seed``."""
        results = []
        for dtype in DTYPES:
            for i in range(self.cases):
                here = (i, list(DTYPES).index(dtype))
                steady = np.random.default_rng([seed, baseline, *here]).random() >= self.changed
                drawn_from = ((0, inputs), (1, baseline if steady else seed))
                draws = [np.random.default_rng([*stream, *here]) for stream in drawn_from]
                results += self._case(CaseParts("model", {"N": i}, dtype=dtype, device="cuda"), *draws)
        return Report(tuple(results), environment)

    def _case(self, case: CaseParts, inputs: np.random.Generator, draw: np.random.Generator) -> list[CheckResult]:
        dtype = case.dtype
        measured: dict[str, list[Measurement]] = {"forward": [], "gradients": []}
        for tensor, count in self.elements.items():
            check = "gradients" if tensor.startswith("grad_") else "forward"
            errors = self.error(tensor, dtype) * _SHARE * draw.standard_normal(count)
            truth, granted = inputs.standard_normal(count), self.bound(tensor, dtype)
            norm = float(np.linalg.norm(truth))
            values = {
                "element": (float(np.abs(errors).max()) / (_CONFIDENCE * granted), 1.0, "bound"),
                "relative_norm": (float(np.linalg.norm(errors)) / norm, granted * math.sqrt(count) / norm, "1"),
            }
            if count > 1:
                bias = abs(float(errors @ truth)) / norm**2
                values["signed_bias"] = (bias, _CONFIDENCE * granted / norm, "1")
            measured[check] += [
                Measurement(tensor, measure, *numbers, self.source) for measure, numbers in values.items()
            ]
        meets = ("precise", "eager")
        return [
            CheckResult(case.name, c, Verdict.PASS, tuple(m), _POWER, meets=meets, parts=case)
            for c, m in measured.items()
        ]
