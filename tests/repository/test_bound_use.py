"""The table of docs/bounds.md: what writes it, and that it has what was asked for."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.repository import ROOT
from support.rounded_sums import OPS, STORAGES

PAGE = ROOT / "docs" / "bounds.md"
ROW = re.compile(
    r"^\| (?P<what>[^|]+) \| (?P<storage>\w+) \| (?P<smallest>[\d.e+-]+) \| (?P<largest>[\d.e+-]+) \|$", re.M
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("measure_bound_use")


def test_it_measures_replaces_the_table_and_judges(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["measure", "--largest", "6", "--write", str(page)])
    assert benchmark.main() == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert capsys.readouterr().out.strip() in text
    assert len(ROW.findall(text)) == len(OPS) * len(STORAGES) + 7
    # A tolerance that everything is within, or nothing, fails.
    for attribute, value in (("MOST", 1e9), ("MOST", 0.5), ("LEAST", 0.9)):
        monkeypatch.setattr(benchmark, attribute, value)
        assert benchmark.main() == 1
        monkeypatch.undo()
        monkeypatch.setattr(sys, "argv", ["measure", "--largest", "6"])


def test_the_page_has_every_op_within_its_tolerance_and_every_defect_outside(benchmark: ModuleType) -> None:
    rows = [m.groupdict() for m in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    right = {(r["what"], r["storage"]): r for r in rows if r["what"] in OPS}
    assert set(right) == {(op, storage) for op in OPS for storage in STORAGES}
    assert all(benchmark.LEAST <= float(r["smallest"]) and float(r["largest"]) <= 1 for r in right.values())
    wrong = [r for r in rows if r["what"] not in OPS]
    assert len(wrong) == 7 and all(float(r["smallest"]) > 1 for r in wrong)
