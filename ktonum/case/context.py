"""What a check holds: the runs of one case, and the bounds that they are granted."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ktonum.bounds import ErrorBound, standard_named
from ktonum.case.granted_bounds import bound_at_extremes, granted_bounds
from ktonum.case.runs import CaseRuns
from ktonum.declare.cases import Case
from ktonum.declare.op import Op

__all__ = ["CaseContext"]


class CaseContext(CaseRuns):
    """A case's runs and bounds. Checks read it and never change it; `ktonum.case.variants` makes others from it."""

    def __init__(self, op: Op, case: Case, device: torch.device | None = None) -> None:
        super().__init__(op, case, device)
        self._bounds: dict[str, Mapping[str, ErrorBound]] = {}

    def bounds(self, standard: str) -> Mapping[str, ErrorBound]:
        """Bounds by tensor name, gradients as ``grad_NAME``, under the standard of that name."""
        if standard not in self._bounds:
            self._bounds[standard] = granted_bounds(self, standard_named(standard))
        return self._bounds[standard]

    def bound_at_extremes(self, name: str, standard: str) -> ErrorBound:
        """The bound of one tensor where inputs are at the ends of their range, or reductions are long."""
        return bound_at_extremes(self, name, self.bounds(standard)[name], standard_named(standard))
