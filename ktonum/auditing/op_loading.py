"""Ops by name: from a module, a file, or the ``pyproject.toml`` of a repository.

Imports torch only with the op: the pytest plugin imports this long before it is known whether a test needs it.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktonum.errors import UsageError

if TYPE_CHECKING:
    from ktonum.declare.op import Op

__all__ = ["declared_ops", "load_op", "load_ops"]


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
    found = load_ops((target,), folders, candidate=candidate)
    if len(found) != 1:
        raise UsageError(f"{target!r} has {len(found)} ops: name one of them as {target}:NAME")
    return found[0]


def load_ops(targets: Sequence[str], folders: Sequence[Path] = (), *, candidate: str | None = None) -> tuple[Op, ...]:
    """The ops that ``targets`` name; a module or file without ``:attr`` stands for every op in it.

    Args:
        targets: ``module``, ``module:attr``, ``path/file.py`` or ``path/file.py:attr``.
        folders: Where modules are looked for that are not on ``sys.path``.
        candidate: Replaces the ops' candidate; None keeps it.

    Raises:
        UsageError: A target cannot be imported or is not a `ktonum.Op`, or the candidate cannot be loaded.
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
    return tuple(_with_candidate(op, candidate, folders) for op in found)


def declared_ops(folder: Path) -> tuple[str, ...]:
    """``[tool.ktonum] ops`` of the ``pyproject.toml`` in ``folder``, files made absolute; empty when there is none.

    Raises:
        UsageError: The file is not valid TOML, or ``ops`` is not a list of names.
    """
    file = folder / "pyproject.toml"
    if not file.is_file():
        return ()
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid TOML: {error}") from error
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
