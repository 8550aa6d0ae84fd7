"""The errors of an implementation on further draws of a case's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktonum.declare.evaluation import Run, evaluate, upcast

__all__ = ["DrawnError", "drawn_errors", "root_mean_square", "typical_errors"]


@dataclass(frozen=True)
class DrawnError:
    """A tensor's error on one draw of the inputs: its norm, and its norm divided by the oracle's norm."""

    absolute: float
    relative: float

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> DrawnError:
        """The error of ``actual``: infinite if it is NaN. The relative error is NaN if ``expected`` is zero."""
        norm, error = float(expected.double().norm()), float((actual.double() - expected.double()).norm())
        error = math.inf if math.isnan(error) else error
        return cls(error, error / norm if norm > 0 else math.nan)


def drawn_errors(
    function: Callable[..., Any],
    dtype: torch.dtype,
    *,
    reference: Callable[..., Any],
    runs: Iterable[Run],
    differentiable: Sequence[str],
) -> dict[str, list[DrawnError]]:
    """Errors by tensor of ``function`` in ``dtype``, one for each run, against ``reference`` in float64.

    A run is left out for a tensor that is zero or not finite in the oracle. The error is infinite if the tensor is not
    finite and the oracle's is. Tensors that ``function`` does not return have no errors.
    """
    errors: dict[str, list[DrawnError]] = {}
    for run in runs:
        oracle, tensors = (
            evaluate(f, upcast(run.inputs, d), differentiable=differentiable, upstream=run.upstream).tensors()
            for f, d in ((reference, torch.float64), (function, dtype))
        )
        for name, expected in oracle.items():
            if name in tensors and bool(expected.isfinite().all()) and bool(expected.any()):
                errors.setdefault(name, []).append(DrawnError.of(tensors[name], expected))
    return errors


def typical_errors(
    errors: Mapping[str, Sequence[DrawnError]], *, here: Mapping[str, Tensor], cancelling: Sequence[str]
) -> dict[str, float]:
    """Relative errors by tensor: root mean squares over draws.

    The error of one number in one draw says little, because it may be zero by luck. The error of a cancelling output
    need not follow its value. For such an output the result is at least the root mean square of the absolute errors,
    divided by the norm that the output has ``here``.
    """
    typical = {}
    for name, found in errors.items():
        found = [e for e in found if math.isfinite(e.relative)]
        if not found:
            continue
        typical[name] = root_mean_square([e.relative for e in found])
        norm = float(here[name].double().norm())
        if name in cancelling and norm > 0:
            typical[name] = max(typical[name], root_mean_square([e.absolute for e in found]) / norm)
    return typical


def root_mean_square(numbers: Sequence[float]) -> float:
    """√mean(x²) of at least one number."""
    return math.sqrt(sum(x * x for x in numbers) / len(numbers))
