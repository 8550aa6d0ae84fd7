"""What an author who derives an op's rounding errors writes: an `ErrorModel`, see `ktonum.bounds` for its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ktonum.bounds import Arithmetic
from ktonum.declare.evaluation import Evaluation

__all__ = ["DerivedErrors", "ErrorModel"]

#: (independent, coherent), or these and a bias: see `ErrorBound`.
DerivedErrors: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]


class ErrorModel(Protocol):
    """An op's rounding-error analysis: bounds by output name, and by ``grad_INPUT``."""

    def __call__(
        self,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
        upstream: Mapping[str, Tensor],
        oracle: Evaluation,
        arithmetic: Arithmetic,
    ) -> Mapping[str, DerivedErrors]:
        """(independent, coherent), or these and a bias, by tensor name: see `ErrorBound`.

        Tensors left out get a measured bound.

        Args:
            inputs: As the candidate sees them.
            parameters: The point's parameters.
            upstream: Upstream gradients by output name.
            oracle: The reference's float64 run.
            arithmetic: What is granted.
        """
        ...
