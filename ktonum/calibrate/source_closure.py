"""The source files that a module's behaviour depends on: its own, and those that it imports from the same package."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["source_closure"]


def source_closure(modules: Iterable[str]) -> dict[str, Path]:
    """The source files of the modules and of all modules that they import, directly or not, from their own packages.

    Imports are read from the source, including those inside functions. Nothing is executed, except the packages that
    `importlib.util.find_spec` must load. Three kinds of imports are not followed: modules that are loaded by a name in
    a string, imports for type checkers only, and imports in the ``__init__`` of a top-level package. The latter is for
    users, and no module of the package should depend on it.

    Args:
        modules: Dotted names, e.g. ``ktonum.kernels.loss``.

    Returns:
        Source files by module name, sorted by name. Modules without a source file (built in or compiled) are left out.
    """
    waiting = list(dict.fromkeys(modules))
    packages = {name.partition(".")[0] for name in waiting}
    found: dict[str, Path] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in packages:
            continue
        seen.add(name)
        file = _source_of(name)
        if file is not None:
            found[name] = file
            # The package's ``__init__`` runs before the module.
            waiting.append(name.rpartition(".")[0])
            if "." in name or file.name != "__init__.py":
                waiting += _imports(name, file)
    return dict(sorted(found.items()))


def _source_of(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the name of an object in a module, not of a module
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _imports(name: str, file: Path) -> Iterator[str]:
    """Every module that the source may import. For ``from a import b``, these are ``a`` and ``a.b``."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _executed(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under ``if TYPE_CHECKING:``."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        children: Iterable[ast.AST] = tree.orelse
    else:
        yield tree
        children = ast.iter_child_nodes(tree)
    for child in children:
        yield from _executed(child)
