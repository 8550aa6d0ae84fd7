"""Benchmarks do not depend on the tests, and `collect_gpu_evidence.py` replaces no page that somebody wrote."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script. It puts the repository's root on ``sys.path``, from where other tests would import other kernels."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("collect_gpu_evidence")


def test_gpu_evidence_does_not_replace_a_page_that_it_did_not_write(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text((ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8"), encoding="utf-8")
    written = page.read_bytes()
    monkeypatch.setattr(sys, "argv", ["collect_gpu_evidence.py", "--out", str(tmp_path), "--only", "no such stage"])
    assert evidence.main() == 2 and page.read_bytes() == written
    assert f"{page} was not written by this script: pass another folder" in capsys.readouterr().err
    page.write_text(f"# What was measured on GPUs\n\n{evidence.COLLECTED}\n", encoding="utf-8")
    assert not evidence.holds_another_page(tmp_path)


def test_by_default_gpu_evidence_goes_to_a_folder_of_its_own(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["collect_gpu_evidence.py", "--only", "no such stage"])
    (tmp_path / "gpu_evidence").mkdir()
    (tmp_path / "gpu_evidence" / "README.md").write_text("by hand\n", encoding="utf-8")
    assert evidence.main() == 2
    assert str(tmp_path / "gpu_evidence" / "README.md") in capsys.readouterr().err
