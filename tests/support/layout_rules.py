"""The layout, read from the import statements: a room imports only rooms above it in the list.

What must stay independent of each other (measure, oracle, threshold; one check and the next) has a rule of its own.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

MAX_LINES = 300
GRAB_BAGS = {"common", "helper", "helpers", "misc", "util", "utils"}

#: The rooms of ktonum/, in the order that data takes through them. A room is a folder, or a file beside the folders.
#: It imports only rooms above it; inside a room modules may import each other in any order, but not in a circle.
LIBRARY = (
    "errors",
    "results",
    "bounds",
    "declare",
    "measure",
    "gradient_check",
    "report",
    "gate",
    "ready_ops",
    "case",
    "power",
    "locate",
    "checks",
    "tolerances",
    "auditing",
    "calibrate",
    "pytest_plugin",
    "cli",
    "__main__",
)
#: The rooms of kernels/, likewise.
KERNELS = ("contract", "device", "step", "loss", "audit", "peers", "bench")
#: These only hand out names, to users; nothing inside imports from them, but for the version.
FACES = ("ktonum", "ktonum.kernels")
#: The only room of kernels/ that knows the numerics library: the op under audit.
OP_ROOM = "ktonum.kernels.audit"
#: May spell the name of a kernels module, to look up an op or a command by it. They must not import one either.
SHIPPED_OP_LOOKUP = ("ktonum.ready_ops", "ktonum.cli.command_line")


@dataclass(frozen=True)
class Apart:
    """Modules that match ``who``, all ``but`` one, do not import each other."""

    who: str
    but: str
    why: str


APART = (
    Apart("ktonum.checks.*", "ktonum.checks.check", "checks do not import each other"),
    Apart("ktonum.power.*_defects", "ktonum.power.defect", "kinds of defects do not import each other"),
)


@dataclass(frozen=True)
class Ban:
    """Modules that match ``who`` do not import what starts with a name in ``what``, unless it is in ``but``."""

    who: str
    what: tuple[str, ...]
    why: str
    but: tuple[str, ...] = ()
    #: Whether the ban holds only for what runs on import, so that a function may still import it.
    on_import_only: bool = False


_LAZY = "loads before anyone knows whether torch is needed"
_LOADED_FIRST = (
    *("errors", "results", "results.*", "pytest_plugin", "declare", "declare.cases", "ready_ops", "calibrate"),
    "calibrate.calibration_settings",
    *("auditing", "auditing.audit_settings", "auditing.plan", "auditing.op_loading", "auditing.devices"),
    *("auditing.gpu_slots", "auditing.audit_process", "auditing.worker_crashes", "auditing.item_runner"),
    *("auditing.pytest_items", "auditing.session_hooks", "auditing.pytest_session"),
)
BANS = (
    Ban("ktonum.measure.comparison", ("ktonum.bounds",), "a measure knows no threshold", ("ktonum.bounds.formats",)),
    Ban(
        "ktonum.gradient_check.differences",
        ("torch.autograd", "ktonum.gradient_check"),
        "differences are the oracle of autograd",
        ("ktonum.gradient_check.odd_fits",),
    ),
    Ban(
        "ktonum.gradient_check.odd_fits",
        ("torch", "ktonum"),
        "differences are the oracle of autograd",
    ),
    *(Ban(f"ktonum.{m}", ("torch", "triton"), _LAZY, on_import_only=True) for m in _LOADED_FIRST),
    Ban("ktonum*", ("triton",), "the numerics library runs where Triton is absent", on_import_only=True),
    Ban("ktonum.kernels.contract.*", ("triton",), "the contract is plain PyTorch"),
    Ban("ktonum.kernels.device.*.kernels", ("torch",), "device code alone: launching is for launch.py beside it"),
)


@dataclass(frozen=True)
class Import:
    """One imported (or, for ``torch.autograd``, used) name, and whether it is imported when the module is."""

    target: str
    line: int
    on_import: bool


@dataclass(frozen=True)
class Source:
    """One file, under the name by which it is imported."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def in_kernels(self) -> bool:
        return within(self.module, "ktonum.kernels")


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def sources(root: Path) -> list[Source]:
    """Every file of the two packages; not through the symlinks, which would show the kernels twice."""
    found = []
    for folder, package in (("ktonum", "ktonum"), ("kernels", "ktonum.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder)
            if any((root / folder / p).is_symlink() for p in inner.parents if p != Path(".")):
                continue
            parts = [package, *inner.with_suffix("").parts]
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            found.append(Source(path.relative_to(root).as_posix(), module, text, ast.parse(text)))
    return found


def imports(source: Source, known: set[str]) -> Iterator[Import]:
    """The import statements, with relative ones made absolute and ``from package import module`` seen through."""
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]

    def visit(node: ast.AST, on_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, on_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full in known or not within(base, "ktonum")
                yield Import(full if is_module or alias.name == "__version__" else base, node.lineno, on_import)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.autograd":
            yield Import("torch.autograd", node.lineno, False)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, on_import)
            return
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, on_import and not deferred)

    return visit(source.tree, True)


def room(module: str) -> str:
    """The name of the room that a module is in, or of the module itself where it is none of a room."""
    parts = module.split(".")
    return ".".join(parts[: 3 if within(module, "ktonum.kernels") else 2])


def rank(module: str) -> int | None:
    """The place of a module's room in its list; the face of a package comes last. None for a module of no room."""
    names = KERNELS if within(module, "ktonum.kernels") else LIBRARY
    name = room(module).rpartition(".")[2]
    if module in FACES:
        return len(names)
    return names.index(name) if name in names else None


def objections(source: Source, item: Import) -> Iterator[str]:
    """Why ``source`` should not import ``item``; nothing when it may."""
    target, own, theirs = item.target, rank(source.module), rank(item.target)
    if within(target, "kernels"):
        yield "that top-level name belongs to another package; it is ktonum.kernels"
    for ban in BANS:
        applies = fnmatchcase(source.module, ban.who) and not (ban.who == "ktonum*" and source.in_kernels)
        banned = any(within(target, w) for w in ban.what) and not any(within(target, b) for b in ban.but)
        if applies and banned and (item.on_import or not ban.on_import_only):
            yield ban.why
    if not within(target, "ktonum") or target in ("ktonum.__version__", source.module):
        return
    to_kernels = within(target, "ktonum.kernels")
    if to_kernels and not source.in_kernels:
        yield "the numerics library knows no kernels"
    elif source.in_kernels and not to_kernels:
        if target != "ktonum.errors" and not within(source.module, OP_ROOM):
            yield f"of ktonum only errors; {OP_ROOM} may import more"
    elif own is not None and theirs is not None and theirs > own:
        yield "a room imports only rooms above it in the list of tests/support/layout_rules.py"
    for apart in APART:
        if all(fnmatchcase(m, apart.who) and m != apart.but for m in (source.module, target)):
            yield apart.why


def circles(files: list[Source], known: set[str]) -> Iterator[str]:
    """Modules of one room that import each other in a circle, each circle once."""
    inside: dict[str, dict[str, int]] = defaultdict(dict)
    paths = {source.module: source.path for source in files}
    for source in files:
        for item in imports(source, known):
            if item.target in known and item.target != source.module and room(item.target) == room(source.module):
                inside[source.module].setdefault(item.target, item.line)
    seen: set[str] = set()

    def visit(module: str, way: list[str]) -> Iterator[str]:
        if module in way:
            circle = way[way.index(module) :]
            line = inside[circle[0]][(circle[1:] or circle)[0]]
            yield f"{paths[module]}:{line} imports in a circle: {' imports '.join([*circle, module])}"
        elif module not in seen:
            for target in sorted(inside.get(module, ())):
                yield from visit(target, [*way, module])
            seen.add(module)

    for module in sorted(inside):
        yield from visit(module, [])


def violations(root: Path) -> list[str]:
    """Every breach of the layout in the tree at ``root``, as ``file:line what: why``."""
    files = sources(root)
    known = {source.module for source in files}
    found = []
    for source in files:
        if rank(source.module) is None:
            found.append(f"{source.path}:1 is in no room that tests/support/layout_rules.py lists: give it one")
        if (lines := len(source.text.splitlines())) > MAX_LINES:
            found.append(f"{source.path}:{lines} is longer than {MAX_LINES} lines: one concern a file")
        if GRAB_BAGS & {word for part in source.module.split(".") for word in part.split("_")}:
            found.append(f"{source.path}:1 is named like a grab bag: name the concern")
        if source.path.endswith("__init__.py") and ast.get_docstring(source.tree) is None:
            found.append(f"{source.path}:1 does not say what the room is for: give it a docstring")
        for item in imports(source, known):
            found += [f"{source.path}:{item.line} imports {item.target}: {why}" for why in objections(source, item)]
        if not source.in_kernels and source.module not in SHIPPED_OP_LOOKUP:
            for node in ast.walk(source.tree):
                if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                    continue
                if re.fullmatch(r"ktonum\.kernels[\w.:]*", node.value):
                    found.append(
                        f"{source.path}:{node.lineno} names {node.value}: the numerics library knows no kernels"
                    )
    return found + list(circles(files, known))
