"""The function under audit, as an `Op`, and the equations that it obeys, as `Law` s."""

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

#: The prefix of the names of modules that are loaded by the path of their file. The rest depends on the path.
FILE_MODULE = "_ktonum_file_"


@dataclass(frozen=True)
class Law:
    """An equation between runs of the candidate.

    The candidate runs on the original inputs and on ``variants``. ``combine`` puts the variants' results together. They
    must equal the original results: outputs and gradients, each within its bound.

    Attributes:
        name: E.g. ``batch split``.
        variants: Makes the other runs from the original run, or returns None if the law does not apply to it.
        combine: Takes the evaluations of the variants and the original run. Returns the evaluation that the original
            must equal. It may leave out outputs or gradients about which the law says nothing.
        exact: If True, the equation must hold bit for bit.
        scale: Factor of the bounds, unless the law is exact. It is 2 if both sides of the equation have an error of up
            to one bound.
        promised: Whether the op promises the law. If False, a violation is reported as INCONCLUSIVE instead of failing.
        applies: Whether the law applies, given a point's parameters.
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
        name: A word of letters, digits, ``-`` and ``_``. It is part of every case's name.
        candidate: The implementation, called as ``candidate(**inputs, **parameters)``, or its ``module:attr``.
        reference: The same function in plain PyTorch, called in the same way, correct in any floating dtype. Its run in
            float64 is the oracle. Outputs that it returns without a gradient are not differentiated in the audit.
        sample: Draws a case's inputs by name from a `Draw`. Candidate, reference and oracle see the same values.
        dims: The points of the audit (or plain mappings of sizes): one list for every profile, or a list by profile
            name.
        laws: Equations that the candidate must satisfy.
        differentiable: Names of the inputs that get gradients; empty means every floating tensor.
        error_model: Derives the errors of this op, see `ktonum.declare.error_model`. If None, bounds come from measured
            references.
        special_inputs: Inputs at the ends of their range, by a short description, see `ktonum.declare.special_inputs`.
            If None, each differentiable input is made large and zero in turn.
        peak_memory: Takes dims, parameters and the dtype's name. Returns the most bytes of device memory that forward
            and backward may use in addition to the inputs. If None, there is no bound.
        reductions: Dims that are summed over. The check ``growth`` measures errors while each of them grows.
        cancelling: Names of outputs that sum terms of both signs and may be close to zero. Their relative error has no
            upper limit, so no tolerance is calibrated for them.
        candidates: Other implementations by short name, as ``module:attr``.
        adapt: Takes an implementation and the point's parameters, and returns a function of the op's inputs, for
            candidates with another interface. It may raise `ktonum.errors.UsageError` if the implementation lacks a
            feature; the case is then INCONCLUSIVE, with the message as the reason.

    Raises:
        UsageError: The name is not a word, or the profile ``quick`` has no points.
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
            raise UsageError(f"name = {self.name!r}: pass a word of letters, digits, '-' and '_'")
        if not self.points(PROFILES[0]):
            raise UsageError(f"op {self.name!r} has no dims: pass at least one mapping of sizes, e.g. [{{'N': 64}}]")

    def points(self, profile: str) -> tuple[Point, ...]:
        """The points of a profile, ``quick`` or ``full``.

        Raises:
            UsageError: The profile is unknown, or ``dims`` has other profiles or lacks this one.
        """
        if profile not in PROFILES:
            raise UsageError(f"unknown profile {profile!r}: use {' or '.join(PROFILES)}")
        if isinstance(self.dims, Mapping):
            if set(self.dims) - set(PROFILES) or profile not in self.dims:
                raise UsageError(
                    f"op {self.name!r} has dims for {', '.join(map(repr, self.dims))}: pass them for "
                    f"{' and '.join(PROFILES)}"
                )
            listed = self.dims[profile]
        else:
            listed = self.dims
        return tuple(p if isinstance(p, Point) else Point(dict(p)) for p in listed)

    def cases(self, *, profile: str, dtypes: Sequence[str], device: str) -> tuple[Case, ...]:
        """All cases of a profile, sorted by dtype in the given order.

        Raises:
            UsageError: See `points`.
        """
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
            known = f"use one of {', '.join(self.candidates)}, or" if self.candidates else "the op has no other:"
            raise UsageError(
                f"unknown candidate {target!r} for op {self.name!r}: {known} name yours as module:attr or "
                f"path/file.py:attr"
            )
        return replace(self, candidate=load_object(target))

    def bound_candidate(self, parameters: Mapping[str, Any]) -> Callable[..., Any]:
        """The candidate as a function of the inputs alone, with the parameters filled in.

        Raises:
            UsageError: The candidate cannot be imported, or ``adapt`` refuses the parameters.
        """
        candidate = load_object(self.candidate) if isinstance(self.candidate, str) else self.candidate
        if self.adapt is not None:
            return self.adapt(candidate, parameters)
        return lambda **inputs: candidate(**inputs, **parameters)


def load_object(target: str) -> Any:
    """The object with the name ``module:attr`` or ``path/file.py:attr``.

    Raises:
        UsageError: The target has another form, has no such attribute, or its import failed. The message then includes
            that of the import.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UsageError(f"{target!r} does not name an object: write module:attr or path/file.py:attr")
    try:
        found: Any = _module_from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise UsageError(f"cannot import {place!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{place!r} has no {attribute!r}: check the spelling after the colon")
        found = getattr(found, part)
    return found


def _module_from_file(path: str) -> ModuleType:
    """A module from a file. Each file is loaded only once, so that its classes keep their identity."""
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
