"""Benchmarks do not depend on the tests. Tests import what both need from benchmarks/subjects/."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.repository import ROOT


def imports_from_tests(root: Path) -> list[str]:
    """Each import in benchmarks/ of a name that is in tests/, or of tests/ itself, as ``file:line name``."""
    theirs = {"tests", *(path.stem for path in (root / "tests").iterdir())}
    found = []
    for path in sorted((root / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            place = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            found += [f"{place} {name}" for name in names if name.partition(".")[0] in theirs]
    return found


def test_benchmarks_import_nothing_from_tests() -> None:
    assert not imports_from_tests(ROOT)


@pytest.mark.parametrize(
    "line",
    ["from support.planted import ALL", "import tests.support", "def late():\n    from support import repository"],
)
def test_a_planted_import_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "tests" / "support").mkdir(parents=True)
    (tmp_path / "benchmarks" / "subjects").mkdir(parents=True)
    (tmp_path / "benchmarks" / "lawful.py").write_text("import torch\nfrom subjects import planted\n", encoding="utf-8")
    (tmp_path / "benchmarks" / "subjects" / "planted.py").write_text(f"{line}\n", encoding="utf-8")
    (found,) = imports_from_tests(tmp_path)
    assert found.startswith("benchmarks/subjects/planted.py:")
