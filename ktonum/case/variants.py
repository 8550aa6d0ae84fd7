"""Variants of a case: other inputs, other upstream gradients, other sizes, further draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from ktonum.case.runs import CaseRuns
from ktonum.declare.drawing import Draw
from ktonum.declare.evaluation import Run

__all__ = ["further_runs", "redrawn", "resized", "varied"]

_Case = TypeVar("_Case", bound=CaseRuns)


def varied(
    case: _Case, *, inputs: Mapping[str, Any] | None = None, upstream: Mapping[str, Tensor] | None = None
) -> _Case:
    """The same case with other inputs or upstream gradients, and with an oracle, runs and bounds of its own."""
    other = type(case)(case.op, case.case, case.device)
    other.inputs = case.inputs if inputs is None else dict(inputs)
    other.upstream = case.upstream if upstream is None else dict(upstream)
    return other


def resized(case: _Case, dims: Mapping[str, int]) -> _Case:
    """The same case at other sizes, and so with other inputs."""
    point = replace(case.case.point, dims={**case.case.point.dims, **dims})
    return type(case)(case.op, replace(case.case, point=point), case.device)


def redrawn(case: _Case, index: int) -> _Case:
    """The same case with other inputs from the same distribution, one set for each index."""
    return varied(case, inputs=case.op.sample(Draw.of(case.case, case.device, purpose=f"draw {index}")))


def further_runs(case: CaseRuns, count: int) -> Iterator[Run]:
    """The case's run on ``count`` further draws of the inputs, the same each time; one is in memory at a time."""
    return (redrawn(case, i).run for i in range(count))
