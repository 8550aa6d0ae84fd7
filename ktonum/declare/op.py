"""What is audited: an `Op`, and the `Law` s it obeys."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ktonum.declare.cases import PROFILES, Case, Point, seed_of
from ktonum.errors import UsageError

if TYPE_CHECKING:
    from ktonum.declare.drawing import Draw
    from ktonum.declare.error_model import ErrorModel
    from ktonum.declare.evaluation import Evaluation, Run
    from ktonum.declare.special_inputs import SpecialInputs

__all__ = ["FILE_MODULE", "Law", "Op", "load_object"]

#: How the name of a module begins that was loaded by the path of its file; the rest depends on the path.
FILE_MODULE = "_ktonum_file_"


@dataclass(frozen=True)
class Law:
    """An equation between runs of the candidate.

    The runs on ``variants(inputs)``, put together by ``combine``, must equal the run on ``inputs``: outputs and
    gradients, each within its bound.

    Attributes:
        name: E.g. ``batch split``.
        variants: The original run to the other runs, or None where the law does not apply.
        combine: Evaluations of the variants, and the original run, to the evaluation that the original must equal.
            It may leave out outputs or gradients on which the law says nothing.
        exact: The equation holds bit for bit.
        scale: Multiplies the bounds, unless it is exact: 2 where the original and what it is held against are off by
            one bound each.
        promised: Whether the op promises it. What is not promised is told, and does not fail an audit.
        applies: Whether the law says anything under a point's parameters.
    """

    name: str
    variants: Callable[[Run], Sequence[Run] | None]
    combine: Callable[[Sequence[Evaluation], Run], Evaluation]
    exact: bool = False
    scale: float = 2.0
    promised: bool = True
    applies: Callable[[Mapping[str, Any]], bool] = lambda parameters: True


@dataclass(frozen=True, kw_only=True)
class Op:
    """A function under audit.

    Attributes:
        name: A word; part of every case's name.
        candidate: The implementation, called as ``candidate(**inputs, **parameters)``; or its ``module:attr``.
        reference: Plain PyTorch with the same signature, right at any floating dtype; run in float64 it is the oracle.
            Outputs that it returns without a gradient carry none under audit.
        sample: Draws a case's inputs by name from a `Draw`; floating tensors of ``draw.dtype`` are the values that
            candidate, reference and oracle all see.
        dims: Where to audit: points (or plain mappings of sizes), for every profile or by profile name.
        laws: Equations the candidate must satisfy.
        differentiable: Names of the inputs that get gradients; empty means every floating tensor.
        error_model: Derives bounds from an analysis of this op, see `ktonum.bounds`; None uses measured references.
        special_inputs: Inputs at the ends of their range, by a few words each, see `ktonum.declare.special_inputs`;
            None makes every differentiable input large and zero in turn.
        peak_memory: The most bytes of device memory that a run, forward and backward, may take beside its inputs, of
            dims, parameters and dtype name; None declares no bound.
        reductions: Dims that are summed over: errors are measured as each of them grows.
        cancelling: Outputs that sum terms of either sign and may come out near zero: relative to themselves their
            errors have no upper limit, and no tolerance in their own roundings is measured.
        candidates: Further implementations by short name, as ``module:attr``.
        adapt: Makes a candidate callable with the op's inputs, where it has another interface. It is called with the
            implementation and the point's parameters, and may raise `ktonum.errors.UsageError` for what the
            implementation lacks: the case is then INCONCLUSIVE and says so.
    """

    name: str
    candidate: Callable[..., Any] | str
    reference: Callable[..., Any]
    sample: Callable[[Draw], dict[str, Any]]
    dims: Sequence[Point | Mapping[str, int]] | Mapping[str, Sequence[Point | Mapping[str, int]]]
    laws: tuple[Law, ...] = ()
    differentiable: tuple[str, ...] = ()
    error_model: ErrorModel | None = None
    special_inputs: Mapping[str, SpecialInputs] | None = None
    reductions: tuple[str, ...] = ()
    peak_memory: Callable[[Mapping[str, int], Mapping[str, Any], str], float] | None = None
    cancelling: tuple[str, ...] = ()
    candidates: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[Any, Mapping[str, Any]], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"an op's name is a word of letters, digits, '-' and '_': {self.name!r} is not")
        if not self.points(PROFILES[0]):
            raise UsageError(f"op {self.name!r} has no dims: pass at least one mapping of sizes, e.g. [{{'N': 64}}]")

    def points(self, profile: str) -> tuple[Point, ...]:
        """The points of a profile.

        Raises:
            UsageError: There is no such profile, or dims name other profiles.
        """
        if profile not in PROFILES:
            raise UsageError(f"unknown profile {profile!r}: use {' or '.join(PROFILES)}")
        if isinstance(self.dims, Mapping):
            if set(self.dims) - set(PROFILES) or profile not in self.dims:
                raise UsageError(
                    f"op {self.name!r} has dims for {', '.join(map(repr, self.dims))}: give {' and '.join(PROFILES)}"
                )
            listed = self.dims[profile]
        else:
            listed = self.dims
        return tuple(p if isinstance(p, Point) else Point(dict(p)) for p in listed)

    def cases(self, *, profile: str, dtypes: Sequence[str], device: str) -> tuple[Case, ...]:
        """Every case of a profile, in an order that keeps the cases of one dtype together."""
        return tuple(
            Case(self.name, point, dtype, device)
            for dtype in dtypes
            for point in self.points(profile)
            if (not point.dtypes or dtype in point.dtypes) and (not point.devices or device in point.devices)
        )

    def with_candidate(self, target: str) -> Op:
        """This op with another candidate: one of `candidates` by name, ``module:attr`` or ``path/file.py:attr``.

        Raises:
            UsageError: The name is unknown, or the target cannot be imported.
        """
        if target in self.candidates:
            target = self.candidates[target]
        elif ":" not in target:
            known = ", ".join(self.candidates) or "none shipped"
            raise UsageError(
                f"unknown candidate {target!r} for op {self.name!r}: use one of {known}, or name yours as module:attr "
                f"or path/file.py:attr"
            )
        return replace(self, candidate=load_object(target))

    def bound_candidate(self, parameters: Mapping[str, Any]) -> Callable[..., Any]:
        """The candidate as a function of the inputs alone, parameters filled in."""
        candidate = load_object(self.candidate) if isinstance(self.candidate, str) else self.candidate
        if self.adapt is not None:
            return self.adapt(candidate, parameters)
        return lambda **inputs: candidate(**inputs, **parameters)


def load_object(target: str) -> Any:
    """The object that ``module:attr`` or ``path/file.py:attr`` names.

    Raises:
        UsageError: The target has another form, or importing it failed; the message carries the import's own.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UsageError(f"{target!r} names nothing: write module:attr or path/file.py:attr")
    try:
        found: Any = _module_from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise UsageError(f"cannot import {place!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{place!r} has no {attribute!r}: check the spelling behind the colon")
        found = getattr(found, part)
    return found


def _module_from_file(path: str) -> ModuleType:
    """A module from a file; the same file is loaded once, so that its classes keep their identity."""
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = f"{FILE_MODULE}{file.stem}_{seed_of(str(file))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None  # a .py file always has a loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
