"""`benchmarks/measure_bound_use.py` measures, replaces the table of a page, and fails if a use is out of range."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import measure_bound_use as benchmark
from subjects.rounded_sums import OPS, STORAGES

ROW = re.compile(
    r"^\| (?P<what>[^|]+) \| (?P<storage>\w+) \| (?P<smallest>[\d.e+-]+) \| (?P<largest>[\d.e+-]+) \|$", re.M
)


def test_it_measures_replaces_the_table_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["measure", "--largest", "6", "--write", str(page)])
    assert benchmark.main() == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert capsys.readouterr().out.strip() in text
    assert len(ROW.findall(text)) == len(OPS) * len(STORAGES) + 7
    # A limit that every defect is within fails, and so does one that a right reduction is not within.
    for attribute, value in (("MOST", 1e9), ("MOST", 0.5), ("LEAST", 0.9)):
        monkeypatch.setattr(benchmark, attribute, value)
        assert benchmark.main() == 1
        monkeypatch.undo()
        monkeypatch.setattr(sys, "argv", ["measure", "--largest", "6"])
