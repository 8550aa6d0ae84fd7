"""What an audit will do: settings, and the list of (case, check) items they stand for.

Imports torch only inside functions: the pytest plugin reads settings long before it is known whether a test needs it.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktonum.declare.cases import PROFILES, Case, parse_dtypes
from ktonum.errors import UsageError
from ktonum.results import STANDARDS

if TYPE_CHECKING:
    from ktonum.declare.op import Op
    from ktonum.results import CheckResult

__all__ = ["DEVICES", "AuditPlan", "AuditSettings", "PlannedItem", "declared_ops", "load_op", "load_ops", "make_plan"]

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class AuditSettings:
    """What was asked for, as text.

    Attributes:
        targets: Ops, as ``module``, ``module:attr``, ``path/file.py`` or ``path/file.py:attr``.
        candidate: Replaces the ops' candidate; None keeps it.
        dtypes: E.g. ``bf16,fp32``; None for all.
        device: One of `DEVICES`.
        profile: ``quick`` or ``full``.
        standard: ``precise`` or ``eager``.
        only: Keep items whose ``CASE::CHECK`` contains one of these; empty keeps all.
        seeds: How many inputs a calibration draws at each point; 0 for an audit.
        first_seed: The offset of the first of these cases; an audit's have none.
        candidates: What a calibration measures instead of the candidates that it takes to be right.
        samples: The file in which a calibration keeps its samples.
    """

    targets: tuple[str, ...]
    candidate: str | None = None
    dtypes: str | None = None
    device: str = "auto"
    profile: str = "quick"
    standard: str = "precise"
    only: tuple[str, ...] = ()
    seeds: int = 0
    first_seed: int = 0
    candidates: tuple[str, ...] = ()
    samples: str = ""

    def check(self) -> None:
        """Check everything that can be checked without loading an op.

        Raises:
            UsageError: A name is none of those accepted.
        """
        parse_dtypes(self.dtypes)
        for what, given, accepted in (
            ("device", self.device, DEVICES),
            ("profile", self.profile, PROFILES),
            ("standard", self.standard, tuple(STANDARDS)),
        ):
            if given not in accepted:
                raise UsageError(f"unknown {what} {given!r}: use {', '.join(accepted)}")


@dataclass(frozen=True)
class PlannedItem:
    """One check on one case, or ``work`` in its place."""

    op: Op
    case: Case
    check: str
    work: Callable[[], CheckResult] | None = None

    @property
    def name(self) -> str:
        """``CASE::CHECK``."""
        return f"{self.case.name}::{self.check}"


@dataclass(frozen=True)
class AuditPlan:
    """Every item of an audit, the checks of a case together, in an order that every process agrees on."""

    ops: tuple[Op, ...]
    items: tuple[PlannedItem, ...]
    device: str

    @property
    def cases(self) -> int:
        """How many cases there are."""
        return len({item.case.name for item in self.items})


def make_plan(settings: AuditSettings, device: str, folders: Sequence[Path] = ()) -> AuditPlan:
    """Load the ops and list what to run.

    Args:
        settings: What was asked for.
        device: ``cpu`` or ``cuda``, decided already: asking CUDA here would bind a worker to a GPU.
        folders: Where modules are looked for that are not on ``sys.path``.

    Raises:
        UsageError: An op or candidate cannot be loaded, two ops share a name, or nothing is left to run.
    """
    settings.check()
    dtypes = parse_dtypes(settings.dtypes)
    ops = load_ops(settings.targets, folders)
    for op in ops:
        if sum(other.name == op.name for other in ops) > 1:
            raise UsageError(f"two ops are called {op.name!r}: give each a name of its own, for results go by it")
    ops = tuple(_with_candidate(op, settings.candidate, folders) for op in ops)
    listed = _samplings if settings.seeds else _checks
    items = [item for op in ops for item in listed(op, settings, dtypes, device)]
    names = ", ".join(op.name for op in ops)
    if not items:
        raise UsageError(
            f"{names} has no case for {', '.join(dtypes)} on {device}: look at its points' dtypes and devices"
        )
    if settings.only:
        kept = tuple(i for i in items if any(text in i.name for text in settings.only))
        if not kept:
            wanted = " or ".join(map(repr, settings.only))
            raise UsageError(f"no item of {names} contains {wanted}: items are called like {items[0].name}")
        return AuditPlan(ops, kept, device)
    return AuditPlan(ops, tuple(items), device)


def _checks(op: Op, settings: AuditSettings, dtypes: tuple[str, ...], device: str) -> list[PlannedItem]:
    from ktonum.auditing.in_process import audit_items

    found = audit_items(op, profile=settings.profile, dtypes=dtypes, device=device)
    return [PlannedItem(op, case, check) for case, check in found]


def _samplings(op: Op, settings: AuditSettings, dtypes: tuple[str, ...], device: str) -> list[PlannedItem]:
    from ktonum.calibrate.block_items import block_works
    from ktonum.calibrate.seed_blocks import Wanted

    if not settings.samples:
        raise UsageError(
            "--ktonum-seeds needs --ktonum-samples, a file to keep samples in; see ktonum calibrate --help"
        )
    wanted = Wanted(settings.candidates, settings.profile, dtypes, device, settings.first_seed, settings.seeds)
    works = block_works(op, wanted, Path(settings.samples))
    return [PlannedItem(work.block.op, work.block.case, work.name, work) for work in works]


def load_op(target: str, *, candidate: str | None = None, folder: str | None = None) -> Op:
    """One op, as ``ktonum audit TARGET --candidate CANDIDATE`` finds it.

    Args:
        target: ``module:attr`` or ``path/file.py:attr``.
        candidate: Replaces the op's candidate; None keeps it.
        folder: Where modules are looked for that are not on ``sys.path``.

    Raises:
        UsageError: Op or candidate cannot be loaded, or ``target`` names several ops.
    """
    folders = () if folder is None else (Path(folder),)
    found = load_ops((target,), folders)
    if len(found) != 1:
        raise UsageError(f"{target!r} has {len(found)} ops: name one of them as {target}:NAME")
    return _with_candidate(found[0], candidate, folders)


def load_ops(targets: Sequence[str], folders: Sequence[Path] = ()) -> tuple[Op, ...]:
    """The ops that ``targets`` name; a module or file without ``:attr`` stands for every op in it.

    Raises:
        UsageError: A target cannot be imported, or names no `ktonum.Op`.
    """
    from ktonum.declare.op import Op, load_object

    found: list[Op] = []
    for target in targets:
        place, colon, _ = target.rpartition(":")
        _make_importable(place if colon else target, folders)
        if colon:
            op = load_object(target)
            if not isinstance(op, Op):
                raise UsageError(f"{target!r} is a {type(op).__name__}: name a ktonum.Op")
            listed = [op]
        else:
            namespace: dict[str, Any] = load_object(f"{target}:__dict__")
            listed = [value for value in namespace.values() if isinstance(value, Op)]
            if not listed:
                raise UsageError(f"{target!r} defines no ktonum.Op: assign one to a name at its top level")
        # The same op may be imported into several modules.
        found += [op for op in listed if not any(op is known for known in found)]
    return tuple(found)


def declared_ops(folder: Path) -> tuple[str, ...]:
    """``[tool.ktonum] ops`` of the ``pyproject.toml`` in ``folder``, files made absolute; empty when there is none.

    Raises:
        UsageError: The file is no valid TOML, or ``ops`` is no list of names.
    """
    file = folder / "pyproject.toml"
    if not file.is_file():
        return ()
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no valid TOML: {error}") from error
    ops = table.get("tool", {}).get("ktonum", {}).get("ops", [])
    if not isinstance(ops, list) or not all(isinstance(op, str) and op for op in ops):
        raise UsageError(f'{file}: [tool.ktonum] ops is {ops!r}: write a list like ["mykernels.audits", "file.py:OP"]')
    return tuple(str(folder / op) if _is_file(op) else op for op in ops)


def _is_file(target: str) -> bool:
    place, colon, _ = target.rpartition(":")
    return (place if colon else target).endswith(".py")


def _with_candidate(op: Op, candidate: str | None, folders: Sequence[Path]) -> Op:
    from ktonum.declare.op import load_object

    if candidate is not None:
        _make_importable(candidate.rpartition(":")[0], folders)
        op = op.with_candidate(candidate)
        if op.adapt is None and not callable(op.candidate):
            raise UsageError(f"candidate {candidate!r} is a {type(op.candidate).__name__}: name something callable")
    elif isinstance(op.candidate, str):
        # Loaded now: a candidate that cannot be imported is one mistake, not one verdict for every case.
        load_object(op.candidate)
    return op


def _make_importable(place: str, folders: Sequence[Path]) -> None:
    """Extend ``sys.path`` by the first folder that has the module, if nothing on it does.

    Only then: a project's root may hold folders whose names shadow other packages.
    """
    top = place.partition(".")[0]
    if not top or place.endswith(".py") or top in sys.modules or importlib.util.find_spec(top) is not None:
        return
    for folder in folders:
        if ((folder / top).is_dir() or (folder / f"{top}.py").is_file()) and str(folder) not in sys.path:
            sys.path.append(str(folder))
            importlib.invalidate_caches()
            return
