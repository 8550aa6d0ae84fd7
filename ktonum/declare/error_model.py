"""What an author who derives an op's rounding errors writes: an `ErrorModel`, see `ktonum.bounds` for its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ktonum.bounds import Arithmetic
from ktonum.declare.evaluation import Evaluation

__all__ = ["DerivedErrors", "ErrorModel"]


@dataclass(frozen=True)
class DerivedErrors:
    """What an analysis says of one tensor's error, before the tensor is rounded to its own dtype.

    Attributes:
        independent: Amplitude of errors that are independent from element to element, ≥ 0, shape of the tensor.
        coherent: Bound on errors that elements share, ≥ 0, same shape.
        bias: Known part of the signed bias ⟨error, expected⟩ / ‖expected‖², a pure number. Its size counts.
    """

    independent: Tensor
    coherent: Tensor
    bias: float = 0.0


class ErrorModel(Protocol):
    """An op's rounding-error analysis."""

    def __call__(
        self,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
        upstream: Mapping[str, Tensor],
        oracle: Evaluation,
        arithmetic: Arithmetic,
    ) -> Mapping[str, DerivedErrors]:
        """Errors by output name, and by ``grad_INPUT``. A tensor that is left out gets a measured bound.

        Args:
            inputs: As the candidate gets them.
            parameters: The point's parameters.
            upstream: Upstream gradients by output name.
            oracle: The reference's float64 run.
            arithmetic: The arithmetic that the implementation may use.
        """
        ...
