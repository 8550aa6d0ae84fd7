"""The layering, read from the import statements: imports point down only, in the order written here.

What must stay independent of each other (measure, oracle, threshold; one check and the next) has a rule of its own.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

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


def test_the_layout_holds() -> None:
    assert len(sources(ROOT)) > 10, "the walk found too few files to mean anything"
    assert not (found := violations(ROOT)), "\n".join(found)


LEGAL = {
    "ktonum/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ktonum.op import Op as Op\n",
    "ktonum/errors.py": "class KtonumError(Exception):\n    pass\n",
    "ktonum/cases.py": "from ktonum.errors import KtonumError\n\ndef dtype():\n    import torch\n",
    "ktonum/comparison.py": "import torch\nfrom ktonum import cases\n",
    "ktonum/bounds.py": "import torch\n",
    "ktonum/differences.py": "import torch\n",
    "ktonum/op.py": "import torch\nSHIPPED = {'kto': 'ktonum.kernels.kto_op:OP'}\n",
    "ktonum/probe.py": "def interpreter():\n    import triton\n",
    "ktonum/checks/__init__.py": "from ktonum.checks import forward, gradients\n",
    "ktonum/checks/forward.py": "from ktonum.probe import interpreter\n",
    "ktonum/checks/gradients.py": "from ktonum.compare import compare\n",
    "ktonum/cli.py": "from ktonum import __version__\nfrom ktonum.checks import CHECKS\n",
    "kernels/__init__.py": "",
    "kernels/formula.py": "import torch\nfrom ktonum.errors import KtonumError\n",
    "kernels/logits_kernels.py": "import triton\n",
    "kernels/launch.py": "import triton\nfrom ktonum.kernels.logits_kernels import logits_kernel\n",
    "kernels/kto_op.py": "import ktonum\nfrom ktonum.op import Op\nfrom ktonum.kernels import launch\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "ktonum" / "kernels").symlink_to("../kernels")
    return root


def test_a_lawful_tree_is_not_accused(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, LEGAL)) == []


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        ("ktonum/cases.py", "from ktonum.op import Op", "point down only"),
        ("ktonum/cases.py", "from ktonum import op", "point down only"),
        ("ktonum/cases.py", "from . import op", "point down only"),
        ("ktonum/cases.py", "from .op import Op", "point down only"),
        ("ktonum/cases.py", "def late():\n    from ktonum.op import Op", "point down only"),
        ("ktonum/cases.py", "if TYPE_CHECKING:\n    from ktonum.op import Op", "point down only"),
        ("ktonum/op.py", "from ktonum import Case", "point down only"),
        ("ktonum/op.py", "import ktonum", "point down only"),
        ("ktonum/checks/forward.py", "from ktonum.checks.gradients import check", "point down only"),
        ("ktonum/checks/forward.py", "from ktonum.checks import gradients", "point down only"),
        ("ktonum/checks/forward.py", "from ..checks.gradients import check", "point down only"),
        ("ktonum/comparison.py", "from ktonum.bounds import bound", "knows no threshold"),
        ("ktonum/comparison.py", "from ktonum import tables", "point down only"),
        ("ktonum/differences.py", "import torch\nx = torch.autograd.grad", "oracle of autograd"),
        ("ktonum/differences.py", "from torch.autograd import grad", "oracle of autograd"),
        ("ktonum/differences.py", "from torch import autograd", "oracle of autograd"),
        ("ktonum/cases.py", "import torch", "whether torch is needed"),
        (
            "ktonum/pytest_plugin.py",
            "try:\n    from torch import Tensor\nexcept ImportError:\n    pass",
            "whether torch",
        ),
        ("ktonum/op.py", "class A:\n    import triton.language as tl", "where Triton is absent"),
        ("ktonum/cli.py", "import ktonum.kernels.kto_op", "knows no kernels"),
        ("ktonum/cli.py", "def run():\n    from ktonum import kernels", "knows no kernels"),
        ("ktonum/runner.py", "OP = 'ktonum.kernels.kto_op:OP'", "names ktonum.kernels.kto_op:OP"),
        ("kernels/formula.py", "from ktonum.compare import compare", "of ktonum only errors"),
        ("kernels/formula.py", "from ktonum.kernels.launch import launch", "point down only"),
        ("kernels/formula.py", "from kernels.launch import launch", "another package"),
        ("kernels/formula.py", "def f():\n    import triton", "plain PyTorch"),
        ("kernels/logits_kernels.py", "import torch", "device code alone"),
        ("kernels/kto_op.py", "from ktonum.kernels import FusedLinearKTOLoss", "point down only"),
        ("kernels/novelty.py", "", "has no place in ORDER"),
        ("ktonum/checks/check_utils.py", "", "grab bag"),
        ("ktonum/helpers/__init__.py", "", "grab bag"),
        ("ktonum/cli.py", "x = 1\n" * (MAX_LINES + 1), "one concern a file"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, why: str) -> None:
    found = violations(plant(tmp_path, {"ktonum/tables.py": "", **LEGAL, path: text}))
    assert found
    assert all(f.startswith(f"{path}:") for f in found)
    assert any(why in f for f in found), found


def python(code: str, cwd: Path) -> str:
    """What ``code`` prints in a process that has imported nothing yet, away from the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_plugin_loads_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, ktonum, ktonum.pytest_plugin, ktonum.results, ktonum.cases, ktonum.kernels\n"
        "print(sorted({'torch', 'triton', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]"


def test_the_numerics_library_loads_without_triton(tmp_path: Path) -> None:
    modules = [s.module for s in sources(ROOT) if not s.in_kernels]
    code = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m.startswith(('ktonum.kernels', 'kernels'))])"
    )
    assert python(code, tmp_path) == "[]"


def test_no_module_takes_the_name_of_a_public_function(tmp_path: Path) -> None:
    """Importing a module binds it in its package: a module ``ktonum.gradcheck`` would replace the function."""
    code = (
        "import importlib, pkgutil, ktonum\n"
        "modules = {m.name for m in pkgutil.iter_modules(ktonum.__path__)}\n"
        "assert not modules & set(ktonum.__all__), modules & set(ktonum.__all__)\n"
        "assert all(callable(getattr(ktonum, name)) for name in ('audit', 'compare', 'gradcheck'))\n"
        "print('ok')"
    )
    assert python(code, tmp_path) == "ok"
