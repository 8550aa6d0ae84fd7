"""The layering, read from the import statements: imports point down only, in the order written here.

What must stay independent of each other (measure, oracle, threshold; one check and the next) has a rule of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 350
GRAB_BAGS = {"common", "helper", "helpers", "misc", "util", "utils"}

#: Lowest first; a module imports only what stands above it in this list. A pattern is one layer, whose modules do not
#: import each other. A package's own name is its ``__init__``. ``ktonum`` and ``ktonum.kernels`` only hand out names.
ORDER = (
    "ktonum.errors",
    "ktonum.device_memory",
    "ktonum.results",
    "ktonum.cases",
    "ktonum.edge_dims",
    "ktonum.environment",
    "ktonum.sampling",
    "ktonum.evaluation",
    "ktonum.drawn_errors",
    "ktonum.differences",
    "ktonum.comparison",
    "ktonum.layouts",
    "ktonum.special_inputs",
    "ktonum.bounds.formats",
    "ktonum.bounds.constants",
    "ktonum.bounds.summation",
    "ktonum.bounds.exponentials",
    "ktonum.bounds.standards",
    "ktonum.bounds",
    "ktonum.granted_errors",
    "ktonum.tables",
    "ktonum.table_files",
    "ktonum.rounding_errors",
    "ktonum.localisation",
    "ktonum.localisation.places",
    "ktonum.tolerance_failure",
    "ktonum.tolerances",
    "ktonum.gradient_check",
    "ktonum.gradient_check.result",
    "ktonum.gradient_check.function",
    "ktonum.gradient_check.probe",
    "ktonum.gradient_check.localise",
    "ktonum.gradient_check.verdict",
    "ktonum.gradient_check.gradcheck",
    "ktonum.op",
    "ktonum.probe",
    "ktonum.interpreter_trust",
    "ktonum.localisation.part",
    "ktonum.localisation.scaling",
    "ktonum.localisation.copies",
    "ktonum.localisation.roundings",
    "ktonum.localisation.signatures",
    "ktonum.localisation.localise",
    "ktonum.context",
    "ktonum.defects.defect",
    "ktonum.defects.*",
    "ktonum.defects",
    "ktonum.power",
    "ktonum.checks.check",
    "ktonum.checks.*",
    "ktonum.checks",
    "ktonum.runner",
    "ktonum.auditing",
    "ktonum.ops",
    "ktonum.ops.activations",
    "ktonum.ops.upcasting",
    "ktonum.ops.row_laws",
    "ktonum.ops.softmax_errors",
    "ktonum.ops.interpreted_kernels",
    "ktonum.ops.*",
    "ktonum.ops.fused_linear_cross_entropy",
    "ktonum.calibration",
    "ktonum.calibration.tails",
    "ktonum.calibration.blocks",
    "ktonum.calibration.sampling",
    "ktonum.calibration.source_closure",
    "ktonum.calibration.samples",
    "ktonum.calibration.items",
    "ktonum.calibration.rows",
    "ktonum.calibration.revision",
    "ktonum.calibration.comparison",
    "ktonum.calibration.provenance",
    "ktonum.smallest",
    "ktonum.interpreter_probe",
    "ktonum.gpu_slots",
    "ktonum.audit_plan",
    "ktonum.reduction_process",
    "ktonum.reproductions",
    "ktonum.audit_process",
    "ktonum.pytest_items",
    "ktonum.report.case_names",
    "ktonum.report.summary",
    "ktonum.report.powers",
    "ktonum.report.*",
    "ktonum.report",
    "ktonum.pytest_plugin",
    "ktonum.audit_session",
    "ktonum.audit_command",
    "ktonum.calibration.view",
    "ktonum.calibration.command",
    "ktonum.gating",
    "ktonum.gating.signed_rank",
    "ktonum.gating.pairing",
    "ktonum.gating.growth",
    "ktonum.gating.reading",
    "ktonum.gating.gate",
    "ktonum.gating.output",
    "ktonum.gating.command",
    "ktonum.doctor",
    "ktonum.cli",
    "ktonum.__main__",
    "ktonum",
    "ktonum.kernels.formula",
    "ktonum.kernels.validation",
    "ktonum.kernels.interface",
    "ktonum.kernels.reference",
    "ktonum.kernels.slabs",
    "ktonum.kernels.block_sizes",
    "ktonum.kernels.softmax_kernels",
    "ktonum.kernels.logits_kernels",
    "ktonum.kernels.row_kernels",
    "ktonum.kernels.sum_kernels",
    "ktonum.kernels.gradient_kernels",
    "ktonum.kernels.formula_kernels",
    "ktonum.kernels.packing_kernels",
    "ktonum.kernels.products",
    "ktonum.kernels.hardware",
    "ktonum.kernels.launcher",
    "ktonum.kernels.packing",
    "ktonum.kernels.launch_formula",
    "ktonum.kernels.launch_logits",
    "ktonum.kernels.launch",
    "ktonum.kernels.launch_rows",
    "ktonum.kernels.launch_gradients",
    "ktonum.kernels.frozen_heads",
    "ktonum.kernels.sequences",
    "ktonum.kernels.sequence_gradients",
    "ktonum.kernels.fetching",
    "ktonum.kernels.passes",
    "ktonum.kernels.operators",
    "ktonum.kernels.autograd",
    "ktonum.kernels.peak_memory",
    "ktonum.kernels.loss",
    "ktonum.kernels.*_candidate",
    "ktonum.kernels.benchmark_cases",
    "ktonum.kernels.benchmark_contenders",
    "ktonum.kernels.benchmark",
    "ktonum.kernels.benchmark_report",
    "ktonum.kernels.benchmark_command",
    "ktonum.kernels.logit_errors",
    "ktonum.kernels.gradient_errors",
    "ktonum.kernels.error_model",
    "ktonum.kernels.kto_laws",
    "ktonum.kernels.kto_op",
    "ktonum.kernels",
)

#: The op under audit: the only kernels files that know the numerics library.
OP_FILES = (
    "ktonum.kernels.logit_errors",
    "ktonum.kernels.gradient_errors",
    "ktonum.kernels.error_model",
    "ktonum.kernels.kto_laws",
    "ktonum.kernels.kto_op",
)
#: May spell the name of a kernels module, to look up a shipped op by it; importing one is not for them either.
SHIPPED_OP_LOOKUP = ("ktonum.op", "ktonum.cli")


@dataclass(frozen=True)
class Ban:
    """Modules that match ``who`` do not import what starts with a name in ``what``."""

    who: str
    what: tuple[str, ...]
    why: str
    #: Whether the ban holds only for what runs on import, so that a function may still import it.
    on_import_only: bool = False


_LAZY = "loads before anyone knows whether torch is needed"
BANS = (
    Ban("ktonum.comparison", ("ktonum.bounds", "ktonum.tables", "ktonum.tolerances"), "a measure knows no threshold"),
    Ban("ktonum.differences", ("torch.autograd", "ktonum.gradient_check"), "differences are the oracle of autograd"),
    *(Ban(f"ktonum.{m}", ("torch", "triton"), _LAZY, True) for m in ("errors", "results", "cases", "pytest_plugin")),
    Ban("ktonum*", ("triton",), "the numerics library runs where Triton is absent", True),
    Ban("ktonum.kernels.formula", ("triton",), "the formula is plain PyTorch"),
    Ban("ktonum.kernels.validation", ("triton",), "validation is plain PyTorch"),
    Ban("ktonum.kernels.reference", ("triton",), "the reference is plain PyTorch"),
    Ban(
        "ktonum.kernels.*_kernels", ("torch",), "device code alone: launching is for launch.py and launch_gradients.py"
    ),
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


def rank(module: str) -> int | None:
    if module in ORDER:
        return ORDER.index(module)
    return next((i for i, pattern in enumerate(ORDER) if "*" in pattern and fnmatchcase(module, pattern)), None)


def objections(source: Source, item: Import) -> Iterator[str]:
    """Why ``source`` should not import ``item``; nothing when it may."""
    target, own, theirs = item.target, rank(source.module), rank(item.target)
    if within(target, "kernels"):
        yield "that top-level name belongs to another package; it is ktonum.kernels"
    for ban in BANS:
        applies = fnmatchcase(source.module, ban.who) and not (ban.who == "ktonum*" and source.in_kernels)
        if applies and (item.on_import or not ban.on_import_only) and any(within(target, w) for w in ban.what):
            yield ban.why
    if not within(target, "ktonum") or target == "ktonum.__version__":
        return
    to_kernels = within(target, "ktonum.kernels")
    if to_kernels and not source.in_kernels:
        yield "the numerics library knows no kernels"
    elif source.in_kernels and not to_kernels and target != "ktonum.errors" and source.module not in OP_FILES:
        yield f"of ktonum only errors; the op files ({', '.join(OP_FILES)}) may import more"
    elif own is not None and theirs is not None and theirs >= own and target != source.module:
        yield "imports point down only, in the order of tests/test_layout.py"


def violations(root: Path) -> list[str]:
    """Every breach of the layout in the tree at ``root``, as ``file:line what: why``."""
    files = sources(root)
    known = {source.module for source in files}
    found = []
    for source in files:
        if rank(source.module) is None:
            found.append(f"{source.path}:1 has no place in ORDER of tests/test_layout.py: give it one")
        if (lines := len(source.text.splitlines())) > MAX_LINES:
            found.append(f"{source.path}:{lines} is longer than {MAX_LINES} lines: one concern a file")
        if GRAB_BAGS & {word for part in source.module.split(".") for word in part.split("_")}:
            found.append(f"{source.path}:1 is named like a grab bag: name the concern")
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
    return found
